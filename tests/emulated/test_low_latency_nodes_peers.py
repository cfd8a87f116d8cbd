# SPDX-License-Identifier: Apache-2.0
"""Low latency over several nodes without some of the ranks: late, stopped, masked, taken back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from collective.case import Case
from collective.nodes import LOW_LATENCY_TWO_BY_TWO
from collective.scenario import go_apart, lose_after_dispatch
from emulated.cluster import Settings
from emulated.host_api import Faults
from emulated.low_latency import (
    LowLatencySession,
    outcome_of_rounds,
    play,
    use_small_blocks,
)

from deepcomm import CommTimeout, RecvLayout

pytestmark = pytest.mark.emulated_backend

TOKEN, _, PADDED = RecvLayout
PADDED_CASE = replace(LOW_LATENCY_TWO_BY_TWO, layout=PADDED)
THREE_BY_TWO = replace(PADDED_CASE, num_ranks=6, num_tokens=3)
WAYS = ("dispatch", "combine", "weights")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_blocks(monkeypatch)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("case", [PADDED_CASE, THREE_BY_TWO], ids=lambda case: case.id)
def test_rank_of_a_node_that_does_not_come_times_out(case: Case, how: str) -> None:
    """Its node and rail name it; who only hears of it names who would have passed it on."""
    absent = case.num_ranks - 1

    def body(session: LowLatencySession) -> int | None:
        one = session.low_latency_dispatch(0)
        session.low_latency_combine(one)
        peer = None
        if session.rank != absent:
            with pytest.raises(CommTimeout) as info:
                come_alone(session, one, how)
            peer = info.value.peer
            with pytest.raises(CommTimeout):
                session.low_latency_dispatch(2)
        session.group.barrier()
        return peer

    for rank, peer in enumerate(play(case, body)[:absent]):
        assert peer is not None
        if rank // 2 == absent // 2 or rank % 2 == absent % 2:
            assert peer == absent
        else:
            assert peer // 2 == rank // 2


def come_alone(session: LowLatencySession, one: Any, how: str) -> None:
    """Run an operation that the last rank does not come to."""
    if how == "dispatch":
        session.low_latency_dispatch(1)
    else:
        session.low_latency_combine(one, override=how == "weights")


@pytest.mark.parametrize("stop_at_ns", [0, 20_000, 60_000, 150_000, 300_000])
@pytest.mark.parametrize("seed", range(2))
def test_rank_of_a_node_stopped_midway_never_hangs(stop_at_ns: int, seed: int) -> None:
    """Wherever it stops, the others finish or time out, and what they delivered is right."""
    stopped = 3
    faults = Faults(stop_rank=stopped, stop_at_ns=stop_at_ns)
    outcomes = play(PADDED_CASE, outcome_of_rounds, Settings(seed, faults))
    assert outcomes[stopped] in ("stopped", "done")
    assert set(outcomes[:stopped]) <= {"timeout", "done"}
    assert outcomes[stopped] == "done" or "timeout" in outcomes


@pytest.mark.parametrize("use_hook", [False, True])
@pytest.mark.parametrize(
    "case",
    [replace(PADDED_CASE, routing="uniform"), replace(THREE_BY_TWO, layout=TOKEN)],
    ids=lambda case: case.id,
)
def test_rank_of_another_node_that_never_comes_is_masked_by_all(case: Case, use_hook: bool) -> None:
    absent = case.num_ranks - 1
    options: dict[str, Any] = {"on_timeout": "mask", "return_hook": use_hook}

    def body(session: LowLatencySession) -> list[bool]:
        session.low_latency_combine(session.low_latency_dispatch(0, on_timeout="mask"))
        if session.rank != absent:
            for round_idx in (1, 2):
                one = session.low_latency_dispatch(round_idx, masked={absent}, **options)
                one.finish()
                for override in (False, case.layout is PADDED):
                    session.low_latency_combine(
                        one, masked={absent}, override=override, **options
                    ).finish()
        mask: list[bool] = session.buffer.rank_mask().tolist()
        session.group.barrier()
        return mask

    masks = play(case, body)
    assert masks[:absent] == [[rank == absent for rank in range(case.num_ranks)]] * absent


@pytest.mark.parametrize("override", [False, True])
def test_rank_that_leaves_after_dispatch_is_masked(override: bool) -> None:
    absent = 3

    def body(session: LowLatencySession) -> None:
        lose_after_dispatch(session, absent, override=override)

    play(replace(PADDED_CASE, routing="uniform"), body)


@pytest.mark.parametrize("absent", [1, 2])
@pytest.mark.parametrize("layout", [PADDED, TOKEN])
def test_masked_rank_of_a_node_counts_as_absent(layout: RecvLayout, absent: int) -> None:
    def body(session: LowLatencySession) -> None:
        session.low_latency_dispatch(0)  # reserves the slots, which is collective
        if session.rank == absent:
            return
        session.buffer.set_rank_mask(absent, True)
        for round_idx in range(6):
            one = session.low_latency_dispatch(round_idx, masked={absent}, zero_padding=True)
            session.low_latency_combine(one, masked={absent}, carried=True, apply_weights=False)

    play(replace(PADDED_CASE, layout=layout, routing="uniform"), body)


@pytest.mark.parametrize("absent", [0, 3])
def test_mask_set_between_dispatch_and_combine_over_nodes(absent: int) -> None:
    def body(session: LowLatencySession) -> None:
        one = session.low_latency_dispatch(0)
        if session.rank != absent:
            session.buffer.set_rank_mask(absent, True)
            session.low_latency_combine(one, masked={absent})
            session.low_latency_combine(one, masked={absent}, override=True)

    play(replace(PADDED_CASE, routing="uniform"), body)


@pytest.mark.parametrize("seed", range(2))
def test_node_can_be_taken_back(seed: int) -> None:
    """Two nodes mask each other, go on by themselves, and come together again."""

    def body(session: LowLatencySession) -> None:
        go_apart(session, [rank for rank in range(4) if rank // 2 != session.rank // 2])

    play(replace(PADDED_CASE, routing="uniform"), body, Settings(seed))


def test_wait_us_stats_name_the_late_rank_of_a_node() -> None:
    def body(session: LowLatencySession) -> list[list[int]]:
        waits = [torch.zeros(4, dtype=torch.int64) for _ in range(2)]
        one = session.low_latency_dispatch(0, wait_us_stats=waits[0])
        session.low_latency_combine(one, wait_us_stats=waits[1])
        return [wait.tolist() for wait in waits]

    faults = Faults(delay_rank=2, delay_from_ns=0, delay_for_ns=400_000_000)
    results = play(PADDED_CASE, body, Settings(3, faults))
    for rank in (0, 1):
        waits = results[rank][0]
        assert waits[2] > 300_000
        assert max(waits[:2]) < 100_000
