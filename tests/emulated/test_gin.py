# SPDX-License-Identifier: Apache-2.0
"""The rail agent: what ranks put where peers want it, late and out of order, and how it fails."""

from __future__ import annotations

import re

import pytest
from emulated.build import ADDRESS, BUILD, CSRC, Variant
from emulated.conftest import Builder

EXCHANGES = ("exchange", "ways", "spans", "reuse")
EXAMPLE = ("example",)
FAILURES = ("other_size", "other_spans", "other_number", "abort")
SEEDS = range(200)
ADDRESS_SEEDS = 20
TIMEOUT_NS = 1_000_000
LATEST_NS = 8 * TIMEOUT_NS
STOPPED = 1
REPORT = re.compile(r"timeout: rank [02] role \d peer (\d) ")


def small_puts() -> Variant:
    """Return how to build with puts of 16 bytes: more of them than a proxy holds."""
    text = (CSRC / "layout" / "gin.hpp").read_text()
    text, count = re.subn(r"kGinPutBytes = [^;]*;", "kGinPutBytes = 16;", text)
    assert count == 1
    folder = BUILD / "small-puts"
    (folder / "layout").mkdir(parents=True, exist_ok=True)
    (folder / "layout" / "gin.hpp").write_text(text)
    return Variant(includes=(folder, CSRC), name="small-puts")


def test_gin_list_is_complete(program: Builder) -> None:
    assert sorted(program("gin").cases()) == sorted(EXCHANGES + EXAMPLE + FAILURES)


@pytest.mark.parametrize("case", EXCHANGES + FAILURES)
def test_gin_passes_every_seed(program: Builder, num_seeds: int, case: str) -> None:
    result = program("gin").run(case, range(num_seeds))
    assert result.failures == 0, result.explain()
    assert result.seeds == num_seeds


@pytest.mark.parametrize("case", EXCHANGES)
def test_gin_cuts_what_is_long(program: Builder, num_seeds: int, case: str) -> None:
    result = program("gin", small_puts()).run(case, range(num_seeds))
    assert result.failures == 0, result.explain()


def test_gin_worked_example(program: Builder) -> None:
    text = (CSRC / "kernels" / "PROTOCOLS.md").read_text().split("\n## moves over GIN\n")[1]
    row = re.search(r"^\| counter of the peer \|[^|]*\| `(\d+)` \| `(\d+)` \|$", text, re.M)
    assert row
    result = program("gin").run("example", SEEDS)
    assert result.failures == 0, result.explain()
    assert result.notes == {f"counters {row[1]} {row[2]}": len(SEEDS)}


def test_gin_abort_is_heard_by_an_agent_that_has_told_its_peer(program: Builder) -> None:
    notes = program("gin").run("abort", SEEDS).notes
    assert notes == {"it had told its peer": len(SEEDS)}


@pytest.mark.parametrize("case", ["exchange", "ways"])
@pytest.mark.parametrize("stop_at_ns", [0, 300, 1_000, 3_000, 8_000])
def test_gin_stopped_rank_ends_moves_everywhere(
    program: Builder, case: str, stop_at_ns: int
) -> None:
    """The others end in time, and where they have failed name somebody that is not through."""
    options = ("--stop-rank", f"{STOPPED}@{stop_at_ns}", "--timeout-ns", str(TIMEOUT_NS))
    result = program("gin").run(case, SEEDS, *options)
    assert result.max_now_ns < LATEST_NS
    assert result.failures > 0
    assert REPORT.match(result.error) or result.error.startswith("wrong data: done[1]"), (
        result.error
    )
    if stop_at_ns == 0:
        assert result.failures == len(SEEDS)
        found = REPORT.match(result.error)
        assert found, result.error
        assert int(found[1]) == STOPPED


@pytest.mark.parametrize("case", EXCHANGES)
def test_gin_late_rank_is_waited_for(program: Builder, case: str) -> None:
    delay = f"{STOPPED}@300+{TIMEOUT_NS // 2}"
    options = ("--delay-rank", delay, "--timeout-ns", str(TIMEOUT_NS))
    result = program("gin").run(case, SEEDS, *options)
    assert result.failures == 0, result.explain()
    assert result.max_now_ns > TIMEOUT_NS // 2, "the delay did not take effect"


@pytest.mark.parametrize("case", EXCHANGES)
@pytest.mark.parametrize("link", ["0-1", "1-0"])
def test_gin_slow_network_only_costs_time(program: Builder, case: str, link: str) -> None:
    extra_ns = TIMEOUT_NS // 20
    options = ("--slow-link", f"{link}+{extra_ns}", "--timeout-ns", str(TIMEOUT_NS))
    result = program("gin").run(case, SEEDS, *options)
    assert result.failures == 0, result.explain()
    assert result.max_now_ns > extra_ns, "the link was not slow"


@pytest.mark.slow
@pytest.mark.parametrize("case", EXCHANGES)
def test_gin_under_the_address_sanitizer(program: Builder, case: str) -> None:
    result = program("gin", ADDRESS).run(case, range(ADDRESS_SEEDS))
    assert result.failures == 0, result.explain()
