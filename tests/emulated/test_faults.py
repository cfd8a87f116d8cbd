# SPDX-License-Identifier: Apache-2.0
"""Stopped, delayed and slow peers: every bounded wait ends in time and says whom it waited for."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
from emulated.conftest import Builder

SEEDS = range(200)
TIMEOUT_NS = 1_000_000
# After a time-out the waits of other blocks, which began later, still have their own deadlines.
LATEST_NS = 6 * TIMEOUT_NS
STOPPED = 1


@dataclass(frozen=True)
class Stop:
    """A probe with rank 1 stopped at once, and what the others must report."""

    case: str
    report: str


STOPS = (
    Stop("signal", rf"timeout: rank 2 receive peer {STOPPED} slot 0 expected 2 observed [01]\b"),
    Stop("bulk_put", rf"timeout: rank 0 receive peer {STOPPED} slot -1 expected 7 observed"),
    Stop("ring", rf"timeout: rank 0 (receive|send) peer {STOPPED} slot [01]"),
    Stop("barrier_fold", r"timeout: rank 0 meet peer"),
    Stop("barrier_fold_one_block", rf"timeout: rank 0 meet peer {STOPPED} "),
    Stop("packet", rf"timeout: rank 0 receive peer {STOPPED} slot \d+ expected 1 observed 0"),
)


@pytest.mark.parametrize("stop", STOPS, ids=lambda stop: stop.case)
def test_stopped_rank_times_out_everywhere(program: Builder, stop: Stop) -> None:
    options = ("--stop-rank", f"{STOPPED}@0", "--timeout-ns", str(TIMEOUT_NS))
    result = program("probes").run(stop.case, SEEDS, *options)
    assert result.failures == len(SEEDS)
    assert re.search(stop.report, result.error), result.error
    assert result.max_now_ns < LATEST_NS
    assert f"rank {STOPPED} " not in result.error, "the stopped rank cannot report"


@pytest.mark.parametrize("stop", STOPS, ids=lambda stop: stop.case)
def test_rank_stopped_midway_never_hangs(program: Builder, stop: Stop) -> None:
    """Wherever the rank stops, the others either finish or time out; none hangs or reads junk."""
    for stop_at_ns in (500, 2_000, 8_000):
        options = ("--stop-rank", f"{STOPPED}@{stop_at_ns}", "--timeout-ns", str(TIMEOUT_NS))
        result = program("probes").run(stop.case, range(50), *options)
        assert result.max_now_ns < LATEST_NS
        if result.failures:
            assert result.error.startswith(("timeout:", "wrong data:", "copy", "sums")), (
                result.error
            )


@pytest.mark.parametrize("stop", STOPS, ids=lambda stop: stop.case)
def test_late_rank_within_the_deadline_is_waited_for(program: Builder, stop: Stop) -> None:
    delay = f"{STOPPED}@300+{TIMEOUT_NS // 2}"
    options = ("--delay-rank", delay, "--timeout-ns", str(TIMEOUT_NS))
    result = program("probes").run(stop.case, SEEDS, *options)
    assert result.failures == 0, result.explain()
    assert result.max_now_ns > TIMEOUT_NS // 2, "the delay did not take effect"


def test_late_rank_beyond_the_deadline_times_out(program: Builder) -> None:
    delay = f"{STOPPED}@0+{3 * TIMEOUT_NS}"
    options = ("--delay-rank", delay, "--timeout-ns", str(TIMEOUT_NS))
    result = program("probes").run("barrier_fold_one_block", SEEDS, *options)
    assert result.failures == len(SEEDS)
    assert f"timeout: rank 0 meet peer {STOPPED} " in result.error


@pytest.mark.parametrize("stop", STOPS, ids=lambda stop: stop.case)
def test_slow_link_only_costs_time(program: Builder, stop: Stop) -> None:
    extra_ns = TIMEOUT_NS // 20
    options = ("--slow-link", f"0-1+{extra_ns}", "--timeout-ns", str(TIMEOUT_NS))
    result = program("probes").run(stop.case, SEEDS, *options)
    assert result.failures == 0, result.explain()
    assert result.max_now_ns > extra_ns, "the link was not slow"


def test_timeout_record_is_complete_and_prompt(program: Builder) -> None:
    """The case checks each field, and that the wait ended within its deadline."""
    options = ("--timeout-ns", str(TIMEOUT_NS))
    result = program("primitives").run("record", SEEDS, *options)
    assert result.failures == 0, result.explain()
    assert TIMEOUT_NS <= result.max_now_ns < 2 * TIMEOUT_NS
