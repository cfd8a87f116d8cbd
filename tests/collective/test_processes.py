# SPDX-License-Identifier: Apache-2.0
"""Ranks as processes: numbers of ranks, delays, instruction sets, threads, kinds of groups."""

from __future__ import annotations

import itertools

import pytest
from collective import workers
from collective.case import Case, case_params

from deepcomm import RecvLayout
from deepcomm._C import simd
from deepcomm.testing import run_processes

TOKEN, EXPERT, PADDED = RecvLayout
CLUSTERS = [
    (1, None),
    (2, None),
    (2, 1),
    (3, None),
    (4, None),
    (4, 2),
    pytest.param(6, None, marks=pytest.mark.slow),
    pytest.param(6, 3, marks=pytest.mark.slow),
    (8, None),
]


def small_cases(num_ranks: int, per_node: int | None) -> list[Case]:
    shape = {
        "num_ranks": num_ranks,
        "ranks_per_node": per_node,
        "num_tokens": 9,
        "num_topk": 3,
        "experts_per_rank": 3,
        "delay_ms": 2.0,
    }
    return [Case(layout=layout, wire=wire, **shape)
            for layout, wire in ((TOKEN, "bf16"), (EXPERT, "fp8"), (PADDED, "fp32"))]  # fmt: skip


@pytest.mark.parametrize(("num_ranks", "per_node"), CLUSTERS)
def test_processes_equal_reference(num_ranks: int, per_node: int | None) -> None:
    explained = run_processes(workers.exchange_all, num_ranks, small_cases(num_ranks, per_node))
    nodes = num_ranks // (per_node or num_ranks)
    for rank, texts in enumerate(explained):
        assert all(f"rank {rank} of {num_ranks}, {nodes} node(s)" in text for text in texts)


def test_instruction_sets_agree_bit_for_bit() -> None:
    """Each rank runs another instruction set; results equal the reference on all."""
    names = [simd.isa_name(isa) for isa in simd.supported_isas()]
    isas = list(itertools.islice(itertools.cycle(names), 3))
    wires = ("bf16", "fp16", "fp32", "fp8", "fp8_ue8m0")
    cases = [
        Case(num_ranks=3, num_topk=4, hidden=1040, layout=layout, wire=wire)
        for layout, wire in itertools.product((TOKEN, PADDED), wires)
    ]
    env = [{"DEEPCOMM_CPU_ISA": isa} for isa in isas]
    explained = run_processes(workers.exchange_with_own_threads, 3, cases, env=env)
    for rank, texts in enumerate(explained):
        for text in texts:
            assert f"isa        {isas[rank]}" in text
            assert f"threads    {rank + 1} of" in text


MANY_CALLS = [
    Case(num_ranks=2, delay_ms=0.3, num_threads=2, routing="uniform"),
    Case(num_ranks=4, delay_ms=0.3, layout=PADDED, wire="fp8"),
    Case(num_ranks=4, ranks_per_node=2, delay_ms=0.3, even=True, routing="uniform"),
]


@pytest.mark.parametrize("num_generations", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    **case_params(MANY_CALLS, slow=MANY_CALLS[1:]),
)
def test_thousand_calls_with_random_delays(case: Case, num_generations: int) -> None:
    arguments = (case, 1000, num_generations)
    counts = run_processes(workers.call_many_times, case.num_ranks, *arguments, timeout_s=120)
    assert min(counts) >= 1000


@pytest.mark.parametrize(
    "groups",
    [
        pytest.param([[0, 2, 4], [1, 3, 5]], id="even-odd"),
        pytest.param([[4, 5], [0, 1, 2, 3], [1, 5]], id="overlapping"),
        pytest.param([[5], [3, 4]], id="not-all"),
    ],
)
def test_subgroups_of_world(groups: list[list[int]]) -> None:
    case = Case(num_tokens=7, num_topk=2, experts_per_rank=2)
    counts = run_processes(workers.exchange_in_subgroups, 6, groups, case)
    assert counts == [sum(rank in ranks for ranks in groups) for rank in range(6)]


@pytest.mark.parametrize("per_node", [None, 2])
def test_mpi4py_communicator(per_node: int | None) -> None:
    run_processes(workers.exchange_over_communicator, 4, small_cases(4, per_node)[:2])


def test_group_of_the_user_stays_usable() -> None:
    totals = run_processes(workers.sum_of_ranks, 4, Case(ranks_per_node=2))
    assert [float(total) for total in totals] == [24.0] * 4
