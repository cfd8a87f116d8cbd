# SPDX-License-Identifier: Apache-2.0
"""A seed is a schedule: the same everywhere, and a failing one replays from its command."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess

import pytest
from emulated.build import OPTIMISED, UNOPTIMISED, Variant
from emulated.conftest import Builder

CASES = ("signal", "bulk_put", "barrier_fold", "packet")
SEEDS = range(30)


@pytest.mark.parametrize("case", CASES)
def test_same_seed_gives_same_trace(program: Builder, case: str) -> None:
    probes = program("probes")
    assert probes.run(case, SEEDS).trace_hash == probes.run(case, SEEDS).trace_hash


@pytest.mark.parametrize("case", CASES)
def test_trace_does_not_depend_on_addresses(program: Builder, case: str) -> None:
    probes = program("probes")
    hashes = {probes.run(case, SEEDS).trace_hash for _ in range(3)}  # each at other addresses
    if can_fix_addresses():
        hashes.add(probes.run(case, SEEDS, no_aslr=True).trace_hash)
    assert len(hashes) == 1


def can_fix_addresses() -> bool:
    """Containers may forbid to switch address randomisation off; the random runs then suffice."""
    if shutil.which("setarch") is None:
        return False
    return subprocess.run(("setarch", "-R", "true"), check=False).returncode == 0


@pytest.mark.parametrize("variant", [UNOPTIMISED, OPTIMISED], ids=lambda variant: variant.name)
@pytest.mark.parametrize("case", CASES)
def test_trace_does_not_depend_on_optimisation(
    program: Builder, case: str, variant: Variant
) -> None:
    other = program("probes", variant).run(case, SEEDS)
    assert other.failures == 0, other.explain()
    assert program("probes").run(case, SEEDS).trace_hash == other.trace_hash


def test_seeds_are_independent_of_their_range(program: Builder) -> None:
    probes = program("probes")
    alone = probes.run("signal", range(7, 8)).trace_hash
    assert alone != probes.run("signal", range(8, 9)).trace_hash
    assert probes.run("signal", range(7, 8)).trace_hash == alone


def test_failing_seed_replays_from_the_printed_command(program: Builder) -> None:
    failed = program("misuse").run("bulk_exit_before_read", range(100))
    assert failed.first_seed is not None
    command = shlex.split(failed.replay)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    again = json.loads(done.stdout)
    assert done.returncode == 1
    assert again["error"] == failed.error
    assert again["first_seed"] == failed.first_seed
    trace = done.stderr.splitlines()
    assert any("r0.b0.t0   bulk store of 64 bytes: r0:zeros+0x0 <- r0:b0" in line for line in trace)
    assert failed.error in trace[-1]
