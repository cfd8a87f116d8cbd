# SPDX-License-Identifier: Apache-2.0
"""A full /dev/shm: a clear error at once, on every rank; no SIGBUS, nobody waits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from multinode import netns
from trap import memory
from trap.memory import BYTES, MARGIN, NUM_RANKS, ROWS_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from trap.rounds import Outcome

pytestmark = pytest.mark.multi_node  # its namespaces give each test a /dev/shm of its own

BOTH = NUM_RANKS * BYTES.high_throughput


def run_in(shm_bytes: int, function: Callable[..., Any]) -> list[Any]:
    with netns.nodes_of(1, shm_bytes=shm_bytes) as nodes:
        results = netns.run_on_nodes(nodes, NUM_RANKS, function)
        assert not nodes[0].leftovers()
    return results


def check_one_is_full(outcomes: list[Outcome], operation: str) -> None:
    """One rank has found no memory, the other learns of it."""
    full = [outcome for outcome in outcomes if "refused" not in outcome.message]
    assert [outcome.kind for outcome in outcomes] == ["CommError"] * NUM_RANKS
    assert len(full) == 1, outcomes
    assert "/dev/shm is full" in full[0].message
    told = outcomes[1 - full[0].rank]
    assert told.peer == full[0].rank
    assert told.message.startswith(operation)
    assert "/dev/shm is full" in told.message
    assert max(outcome.seconds for outcome in outcomes) < 2.0


def test_construction_on_full_memory_names_the_rank_and_the_remedy() -> None:
    outcomes = run_in(BOTH * 3 // 4, memory.construct)
    assert [outcome.kind for outcome in outcomes] == ["CommError"] * NUM_RANKS
    full = [outcome for outcome in outcomes if not outcome.message.startswith("Buffer: ")]
    assert full
    for outcome in outcomes:
        if outcome not in full:
            assert outcome.peer == full[0].rank
            assert f"rank {full[0].rank} failed" in outcome.message
        assert "/dev/shm is full" in outcome.message
        assert "MiB needed" in outcome.message
        assert "--shm-size" in outcome.message


def test_wide_rows_that_do_not_fit_are_refused() -> None:
    outcomes = run_in(BOTH + ROWS_BYTES * 3 // 2 + MARGIN, memory.dispatch_wide_rows)
    check_one_is_full(outcomes, "dispatch: ")


def test_wide_rows_that_fit_nowhere_are_refused_by_all() -> None:
    for outcome in run_in(BOTH + MARGIN, memory.dispatch_wide_rows):
        assert outcome.kind == "CommError"
        assert "/dev/shm is full" in outcome.message


def test_expert_rows_that_do_not_fit_take_the_longer_way() -> None:
    tight = run_in(BOTH + MARGIN, memory.dispatch_to_experts)
    assert tight == [BYTES.high_throughput] * NUM_RANKS
    ample = run_in(4 * BOTH, memory.dispatch_to_experts)
    assert ample[0] > BYTES.high_throughput  # there they are given more


def test_first_low_latency_call_that_does_not_fit_is_refused() -> None:
    ends = run_in(BOTH + BYTES.low_latency * 3 // 2 + MARGIN, memory.start_low_latency)
    check_one_is_full([end.first for end in ends], "low_latency_dispatch: ")
    check_one_is_full([end.second for end in ends], "low_latency_dispatch: ")


def test_growth_that_does_not_fit_raises_on_every_rank() -> None:
    outcomes = run_in(BOTH // 2, memory.grow)
    assert [outcome.kind for outcome in outcomes] == ["CommError"] * NUM_RANKS
    assert any("MiB needed" in outcome.message for outcome in outcomes)
