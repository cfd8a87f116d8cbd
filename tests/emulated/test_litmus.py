# SPDX-License-Identifier: Apache-2.0
"""The probe kernels, from the sources that the GPU runs, hold over many schedules."""

from __future__ import annotations

import pytest
from emulated.build import ADDRESS
from emulated.conftest import Builder

PROBES = (
    "signal",
    "claim",
    "bulk_copy",
    "bulk_put",
    "ring",
    "barrier_fold",
    "barrier_fold_one_block",
    "packet",
)
LARGE = ("signal_large", "bulk_put_large")  # 1,024 and 512 threads on 8 ranks
LARGE_SEEDS = 200
ADDRESS_SEEDS = 20  # the address sanitizer is about seven times slower


def test_litmus_list_is_complete(program: Builder) -> None:
    assert sorted(program("probes").cases()) == sorted(PROBES + LARGE)


@pytest.mark.parametrize("case", PROBES)
def test_litmus_passes_every_seed(program: Builder, num_seeds: int, case: str) -> None:
    result = program("probes").run(case, range(num_seeds))
    assert result.failures == 0, result.explain()
    assert result.seeds == num_seeds


@pytest.mark.parametrize("case", LARGE)
def test_litmus_passes_on_a_large_cluster(program: Builder, num_seeds: int, case: str) -> None:
    result = program("probes").run(case, range(min(num_seeds, LARGE_SEEDS)))
    assert result.failures == 0, result.explain()
    assert result.threads >= 512


def test_litmus_claim_sees_both_outcomes(program: Builder) -> None:
    """Nobody may enter, or one; if only one of these occurred the schedules would be poor."""
    notes = program("probes").run("claim", range(200)).notes
    assert set(notes) == {"nobody entered", "one entered"}


@pytest.mark.slow
@pytest.mark.parametrize("case", PROBES)
def test_litmus_under_the_address_sanitizer(program: Builder, case: str) -> None:
    result = program("probes", ADDRESS).run(case, range(ADDRESS_SEEDS))
    assert result.failures == 0, result.explain()
