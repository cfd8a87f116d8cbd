# SPDX-License-Identifier: Apache-2.0
"""Rails over NCCL's device API, against the reference, bit for bit: two processes are two nodes.

NCCL is told that they are on two hosts, so that GIN is between them; a plugin of ours is the NIC
(tests/multinode/gin_loopback).
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from gpu import backend_cases as cases
from gpu import backend_errors as errors
from gpu import backend_ranks as ranks
from gpu import network_ranks, rail_ranks
from gpu.test_rails import APART
from multinode.gin_loopback.library import environment

from deepcomm import RecvLayout
from deepcomm.testing import run_processes

if TYPE_CHECKING:
    from collections.abc import Callable

    Run = Callable[..., list[Any]]

TOKEN, EXPERT, PADDED = RecvLayout
pytestmark = pytest.mark.gpu(2)

LIMIT_S = 200.0
NUM_PARTS = 4
SOAK_ROUND_S = 0.5
FOUND_WITHIN_S = 80.0  # for a timeout_s of 8
BASE = replace(cases.base_case(2), ranks_per_node=1, rail="gin")


@pytest.fixture
def over_gin() -> Run:
    """Run something on two ranks, between which is nothing but GIN."""

    def run(body: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        # In memory: the driver pins no files.
        with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="deepcomm-gin-") as folder:
            both = {**APART, **environment(folder)}
            nodes = [{**both, "NCCL_HOSTID": f"node-{node}"} for node in range(2)]
            options = {"timeout_s": LIMIT_S, **options}
            return run_processes(ranks.in_process, 2, body, *args, env=nodes, **options)

    return run


def test_gin_is_preferred_and_moves_bytes(over_gin: Run) -> None:
    assert over_gin(network_ranks.move_bytes, ("gin", "nccl")) == ["gin"] * 2


def test_moves_that_differ_in_size_end_in_errors(over_gin: Run) -> None:
    over_gin(network_ranks.move_different_sizes)


def test_abort_ends_a_move_that_no_peer_meets(over_gin: Run) -> None:
    over_gin(network_ranks.abort_a_move)


@pytest.mark.parametrize("part", range(NUM_PARTS))  # each buffer opens networks of its own
def test_exchange_equals_reference(over_gin: Run, part: int) -> None:
    matrix = [replace(case, rail="gin") for case in cases.nodes_matrix(2, 1)]
    over_gin(ranks.exchange_all, matrix[part::NUM_PARTS])


def test_sums_in_several_parts_equal_reference(over_gin: Run) -> None:
    large = replace(BASE, num_tokens=1200, hidden=7168, even=True)
    over_gin(ranks.exchange_all, [large, replace(large, layout=EXPERT, wire="fp8")])


def test_node_and_network_are_counted_apart(over_gin: Run) -> None:
    for layout in RecvLayout:
        over_gin(rail_ranks.count_bytes, replace(BASE, layout=layout, wire="fp8"))


@pytest.mark.parametrize("layout", list(RecvLayout))
def test_growable_buffer_grows(over_gin: Run, layout: RecvLayout) -> None:
    over_gin(ranks.grow, replace(BASE, layout=layout))


def test_mistakes_of_one_rank_are_told_to_all(over_gin: Run) -> None:
    counts = over_gin(errors.make_mistakes, replace(BASE, even=True))
    assert counts == [5 * len(errors.MISTAKES)] * 2


@pytest.mark.parametrize("how", ["exact", "capacity", "combine"])
@pytest.mark.parametrize("layout", [TOKEN, EXPERT])
def test_absent_rank_ends_in_a_timeout(over_gin: Run, layout: RecvLayout, how: str) -> None:
    case = replace(BASE, even=True, layout=layout)
    elapsed_s, _ = over_gin(ranks.miss_a_peer, case, how)
    assert 0.5 < elapsed_s < FOUND_WITHIN_S


def test_lost_process_ends_in_an_error(over_gin: Run) -> None:
    elapsed_s, nothing = over_gin(ranks.lose_a_peer, replace(BASE, even=True), may_die={1})
    assert nothing is None
    assert elapsed_s < FOUND_WITHIN_S


def test_soak_of_random_rounds(over_gin: Run, request: pytest.FixtureRequest) -> None:
    num_rounds = request.config.getoption("--soak-rounds")
    limit_s = LIMIT_S + SOAK_ROUND_S * num_rounds
    counts = over_gin(ranks.soak, BASE, num_rounds, timeout_s=limit_s)
    assert min(counts) >= 2 * num_rounds
