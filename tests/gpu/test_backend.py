# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend's high-throughput operations against the reference, bit for bit.

Ranks are threads on one GPU, or processes on two.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from collective.nodes import NODES_CASES
from collective.session import Oracle
from gpu import backend_cases as cases
from gpu import backend_errors as errors
from gpu import backend_graphs as graphs
from gpu import backend_ranks as ranks

from deepcomm import RecvLayout
from deepcomm.testing import LocalCluster, run_processes

if TYPE_CHECKING:
    from collections.abc import Callable

    from collective.case import Case

TOKEN, EXPERT, PADDED = RecvLayout
pytestmark = pytest.mark.gpu(1)
two_gpus = pytest.mark.gpu(2)

PROCESS_LIMIT_S = 200.0
SOAK_ROUND_S = 0.5  # the reference on the CPU takes most of it
NUM_REPLAYS = 12
NUMS_SMS = (1, 2, 5, 16)
FOUND_WITHIN_S = 8.0  # for a timeout_s of 1


def by_threads(num_ranks: int, body: Callable[..., Any], *args: Any) -> list[Any]:
    # To compile what is not in the cache takes minutes.
    cluster = LocalCluster(num_ranks, device="cuda:0", timeout_s=PROCESS_LIMIT_S)
    return cluster.run(lambda group: body(group, *args))


def by_processes(body: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
    options = {"timeout_s": PROCESS_LIMIT_S, **options}
    return run_processes(ranks.in_process, 2, body, *args, **options)


def ids(some: list[Case]) -> list[str]:
    return [case.id for case in some]


# ---- One GPU --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases.matrix(4), ids=ids(cases.matrix(4)))
def test_four_ranks_equal_reference(case: Case) -> None:
    by_threads(4, ranks.exchange_all, [case], Oracle())


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_other_numbers_of_ranks_equal_reference(num_ranks: int) -> None:
    for case in cases.short_matrix(num_ranks):
        by_threads(num_ranks, ranks.exchange_all, [case], Oracle())


@pytest.mark.parametrize(("num_nodes", "ranks_per_node"), [(2, 4), (4, 2)])
def test_nodes_equal_reference(num_nodes: int, ranks_per_node: int) -> None:
    num_ranks = num_nodes * ranks_per_node
    for case in cases.nodes_matrix(num_ranks, ranks_per_node):
        by_threads(num_ranks, ranks.exchange_all, [case], Oracle())


@pytest.mark.parametrize("case", NODES_CASES, ids=ids(NODES_CASES))
def test_shared_matrix_over_nodes_equals_reference(case: Case) -> None:
    case = replace(case, device="cuda")
    by_threads(case.num_ranks, ranks.exchange_all, [case], Oracle())


@pytest.mark.parametrize("case", cases.SMS_CASES, ids=ids(cases.SMS_CASES))
def test_results_do_not_depend_on_sms(case: Case) -> None:
    by_threads(2, ranks.exchange_with_sms, case, NUMS_SMS)


@pytest.mark.parametrize("layout", list(RecvLayout))
def test_previous_event_is_waited_for(layout: RecvLayout) -> None:
    by_threads(2, ranks.wait_for_previous_event, replace(cases.base_case(2), layout=layout))


@pytest.mark.parametrize("layout", list(RecvLayout))
def test_growable_buffer_grows(layout: RecvLayout) -> None:
    by_threads(2, ranks.grow, replace(cases.base_case(2), layout=layout))


@pytest.mark.parametrize("case", cases.GRAPH_CASES, ids=ids(cases.GRAPH_CASES))
def test_graph_replays_with_new_routings(case: Case) -> None:
    counts = by_threads(2, graphs.replay_with_new_routings, case, NUM_REPLAYS, Oracle())
    assert counts == [NUM_REPLAYS] * 2


def test_exact_dispatch_is_refused_under_capture() -> None:
    case = replace(cases.base_case(2), even=True)
    for message in by_threads(2, graphs.exact_dispatch_is_refused, case):
        assert "num_recv_tokens: expected a capacity while a CUDA graph is captured" in message


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_mistakes_of_one_rank_are_told_to_all(num_ranks: int) -> None:
    case = replace(cases.base_case(num_ranks), even=True)
    counts = by_threads(num_ranks, errors.make_mistakes, case, Oracle())
    assert counts == [5 * len(errors.MISTAKES)] * num_ranks


def test_mistake_that_nobody_waited_for_is_told_at_the_next_call() -> None:
    case = replace(cases.base_case(2), even=True)
    found = by_threads(2, errors.find_at_next_call, case)
    assert [kind for kind, _ in found] == ["CommError", "InvalidArgument"]
    assert all("topk_idx: expected ids in" in text for _, text in found)


@pytest.mark.parametrize("how", ["exact", "capacity", "combine"])
@pytest.mark.parametrize("layout", [TOKEN, EXPERT])
def test_absent_rank_ends_in_a_timeout(layout: RecvLayout, how: str) -> None:
    case = replace(cases.base_case(2), even=True, layout=layout)
    elapsed_s, _ = by_threads(2, ranks.miss_a_peer, case, how)
    assert 0.5 < elapsed_s < FOUND_WITHIN_S


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_soak_of_random_rounds(num_ranks: int, request: pytest.FixtureRequest) -> None:
    num_rounds = request.config.getoption("--soak-rounds")
    case = cases.base_case(num_ranks)
    counts = by_threads(num_ranks, ranks.soak, case, num_rounds, Oracle())
    assert min(counts) >= 2 * num_rounds


@pytest.mark.parametrize("layout", list(RecvLayout))
def test_memory_does_not_grow(layout: RecvLayout) -> None:
    case = replace(cases.base_case(2), layout=layout)
    for reserved in by_threads(2, ranks.reserved_bytes, case, 60):
        assert max(reserved[3:]) <= reserved[2], reserved


# ---- Two GPUs -------------------------------------------------------------------------------


@two_gpus
@pytest.mark.parametrize("layout", list(RecvLayout))
def test_processes_equal_reference(layout: RecvLayout) -> None:
    by_processes(ranks.exchange_all, [case for case in cases.matrix(2) if case.layout is layout])


@two_gpus
def test_processes_that_are_nodes_equal_reference() -> None:
    by_processes(ranks.exchange_all, cases.nodes_matrix(2, 1))


@two_gpus
def test_processes_do_not_depend_on_sms() -> None:
    for case in cases.SMS_CASES:
        by_processes(ranks.exchange_with_sms, case, NUMS_SMS)


@two_gpus
@pytest.mark.parametrize("case", cases.GRAPH_CASES, ids=ids(cases.GRAPH_CASES))
def test_processes_replay_graphs(case: Case) -> None:
    assert by_processes(graphs.replay_with_new_routings, case, NUM_REPLAYS) == [NUM_REPLAYS] * 2


@two_gpus
@pytest.mark.parametrize("layout", list(RecvLayout))
def test_processes_grow_and_wait_for_events(layout: RecvLayout) -> None:
    case = replace(cases.base_case(2), layout=layout)
    by_processes(ranks.grow, case)
    by_processes(ranks.wait_for_previous_event, case)


@two_gpus
def test_processes_are_told_mistakes() -> None:
    case = replace(cases.base_case(2), even=True)
    by_processes(errors.make_mistakes, case)
    found = by_processes(errors.find_at_next_call, case)
    assert [kind for kind, _ in found] == ["CommError", "InvalidArgument"]


@two_gpus
@pytest.mark.parametrize("how", ["exact", "capacity", "combine"])
def test_processes_notice_an_absent_rank(how: str) -> None:
    case = replace(cases.base_case(2), even=True)
    elapsed_s, _ = by_processes(ranks.miss_a_peer, case, how)
    assert 0.5 < elapsed_s < FOUND_WITHIN_S


@two_gpus
def test_processes_outlive_a_dead_rank() -> None:
    case = replace(cases.base_case(2), even=True)
    elapsed_s, nothing = by_processes(ranks.lose_a_peer, case, may_die=[1])
    assert nothing is None
    assert 0.5 < elapsed_s < FOUND_WITHIN_S


@two_gpus
def test_processes_soak(request: pytest.FixtureRequest) -> None:
    num_rounds = request.config.getoption("--soak-rounds")
    limit_s = PROCESS_LIMIT_S + num_rounds * SOAK_ROUND_S
    counts = by_processes(ranks.soak, cases.base_case(2), num_rounds, timeout_s=limit_s)
    assert min(counts) >= 2 * num_rounds


@two_gpus
def test_processes_do_not_grow_in_memory() -> None:
    for reserved in by_processes(ranks.reserved_bytes, cases.base_case(2), 100):
        assert max(reserved[3:]) <= reserved[2], reserved
