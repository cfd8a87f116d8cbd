# SPDX-License-Identifier: Apache-2.0
"""Rails over NCCL, against the reference, bit for bit: two processes are two nodes of one rank.

NCCL is told that they are on two hosts with neither NVLink nor shared memory between them, so
that bytes go through its network transport.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from gpu import backend_cases as cases
from gpu import backend_errors as errors
from gpu import backend_ranks as ranks
from gpu import low_latency_ranks, rail_ranks

from deepcomm import RecvLayout
from deepcomm.testing import run_processes

if TYPE_CHECKING:
    from collections.abc import Callable

TOKEN, EXPERT, PADDED = RecvLayout
pytestmark = pytest.mark.gpu(2)

LIMIT_S = 200.0
SOAK_ROUND_S = 0.5
FOUND_WITHIN_S = 32.0  # for a timeout_s of 4
APART = {
    "NCCL_P2P_DISABLE": "1",
    "NCCL_SHM_DISABLE": "1",
    "NCCL_NVLS_ENABLE": "0",
    "NCCL_SOCKET_IFNAME": "lo",
}
NODES = [{**APART, "NCCL_HOSTID": f"node-{node}"} for node in range(2)]
BASE = replace(cases.base_case(2), ranks_per_node=1, rail="nccl")


def over_network(body: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
    options = {"timeout_s": LIMIT_S, **options}
    return run_processes(ranks.in_process, 2, body, *args, env=NODES, **options)


def test_exchange_equals_reference() -> None:
    over_network(ranks.exchange_all, [replace(c, rail="nccl") for c in cases.nodes_matrix(2, 1)])


def test_sums_in_several_parts_equal_reference() -> None:
    large = replace(BASE, num_tokens=1200, hidden=7168, even=True)
    over_network(ranks.exchange_all, [large, replace(large, layout=EXPERT, wire="fp8")])


def test_node_and_network_are_counted_apart() -> None:
    for layout in RecvLayout:
        over_network(rail_ranks.count_bytes, replace(BASE, layout=layout, wire="fp8"))


@pytest.mark.parametrize("layout", list(RecvLayout))
def test_growable_buffer_grows(layout: RecvLayout) -> None:
    over_network(ranks.grow, replace(BASE, layout=layout))


def test_mistakes_of_one_rank_are_told_to_all() -> None:
    counts = over_network(errors.make_mistakes, replace(BASE, even=True))
    assert counts == [5 * len(errors.MISTAKES)] * 2


@pytest.mark.parametrize("how", ["exact", "capacity", "combine"])
@pytest.mark.parametrize("layout", [TOKEN, EXPERT])
def test_absent_rank_ends_in_a_timeout(layout: RecvLayout, how: str) -> None:
    case = replace(BASE, even=True, layout=layout)
    elapsed_s, _ = over_network(ranks.miss_a_peer, case, how)
    assert 0.5 < elapsed_s < FOUND_WITHIN_S


def test_lost_process_ends_in_an_error() -> None:
    elapsed_s, nothing = over_network(ranks.lose_a_peer, replace(BASE, even=True), may_die={1})
    assert nothing is None
    assert elapsed_s < FOUND_WITHIN_S


def test_low_latency_equals_reference() -> None:
    over_network(low_latency_ranks.fly_all, cases.low_latency_rails(2, 1))


@pytest.mark.gpu(4)
def test_low_latency_over_nodes_of_two_equals_reference() -> None:
    nodes = [node for node in NODES for _ in range(2)]
    matrix = cases.low_latency_rails(4, 2)
    options: dict[str, Any] = {"env": nodes, "timeout_s": LIMIT_S}
    run_processes(ranks.in_process, 4, low_latency_ranks.fly_all, matrix, **options)


def test_low_latency_and_high_throughput_share_the_network() -> None:
    bytes_carried = over_network(rail_ranks.take_turns, replace(BASE, layout=PADDED))
    assert min(bytes_carried) > 0


def test_refusals_of_low_latency_are_told_to_all() -> None:
    counts = over_network(rail_ranks.refuse_in_turn, replace(BASE, layout=PADDED, even=True))
    assert counts == [rail_ranks.NUM_REFUSALS] * 2


@pytest.mark.parametrize("how", ["dispatch", "combine", "weights", "hook"])
def test_absent_rank_of_low_latency_ends_in_a_timeout(how: str) -> None:
    case = replace(BASE, even=True, layout=PADDED)
    elapsed_s, _ = over_network(rail_ranks.miss_a_peer, case, how)
    assert 0.5 < elapsed_s < FOUND_WITHIN_S


def test_soak_of_random_rounds(request: pytest.FixtureRequest) -> None:
    num_rounds = request.config.getoption("--soak-rounds")
    limit_s = LIMIT_S + SOAK_ROUND_S * num_rounds
    counts = over_network(ranks.soak, BASE, num_rounds, timeout_s=limit_s)
    assert min(counts) >= 2 * num_rounds
