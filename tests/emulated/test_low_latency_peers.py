# SPDX-License-Identifier: Apache-2.0
"""Low-latency operations without some of the peers: late, stopped, masked, taken back."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from collective.case import Case
from collective.scenario import go_apart, other_side, take_back_in_flight
from emulated.cluster import RankStopped, Settings
from emulated.host_api import Faults
from emulated.low_latency import (
    EmulatedBackend,
    LowLatencySession,
    leave_unread,
    play,
    refuse_in_flight,
    take_back_beside,
    use_small_blocks,
)

from deepcomm import CommTimeout, RecvLayout
from deepcomm._C import kernels

pytestmark = pytest.mark.emulated_backend

TOKEN, _, PADDED = RecvLayout
SMALL = {"num_ranks": 2, "num_tokens": 5, "hidden": 256, "num_topk": 3, "experts_per_rank": 4}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_blocks(monkeypatch)


def test_late_peer_times_out_with_its_name() -> None:
    def body(session: LowLatencySession) -> None:
        session.low_latency_combine(session.low_latency_dispatch(0))
        if session.rank == 1:
            session.group.barrier()
            return
        with pytest.raises(CommTimeout) as info:
            session.low_latency_dispatch(1)
        assert info.value.peer == 1
        with pytest.raises(CommTimeout):
            session.low_latency_dispatch(2)
        session.group.barrier()

    play(Case(**SMALL, layout=PADDED), body)


@pytest.mark.parametrize("nodes", [{}, {"ranks_per_node": 1}], ids=["one-node", "two-nodes"])
def test_hook_of_a_send_that_has_failed_reads_no_turn(nodes: dict[str, int]) -> None:
    """The host calls it before it knows; whose turn it would be nobody has written."""

    def body(session: LowLatencySession) -> None:
        slots = session.backend.config.num_low_latency_slots
        sent = [session.low_latency_dispatch(i, return_hook=True) for i in range(slots)]
        if session.rank == 0:
            for one in sent:
                one.finish()
            last = session.low_latency_dispatch(slots, return_hook=True)
            with pytest.raises(CommTimeout):  # rank 1 has read nothing, and frees no slot
                last.finish()
        session.group.barrier()

    play(Case(**SMALL, **nodes, layout=PADDED), body)


def dispatch_on_all(session: LowLatencySession) -> None:
    """One operation, after which a rank may stay away."""
    session.low_latency_dispatch(0, return_hook=True).actual.hook()
    session.backend.runtime.flush()
    session.group.barrier()


def test_send_behind_a_failure_takes_no_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be that of an operation that peers may still wait for."""
    monkeypatch.setattr(EmulatedBackend, "settle", lambda _: None)  # the host runs ahead

    def body(session: LowLatencySession) -> None:
        dispatch_on_all(session)
        slots = session.backend.low_latency._open("test").slots
        sends = ctypes.c_uint64.from_address(slots._state.address)
        if session.rank == 0:
            session.low_latency_dispatch(1, return_hook=True).actual.hook()
            session.low_latency_dispatch(2, return_hook=True)
            session.backend.runtime.flush()
            with pytest.raises(CommTimeout):
                session.backend.low_latency.check()
        assert sends.value == (2 - session.rank) * kernels.LOW_LATENCY_SEND_UNIT
        session.group.barrier()

    play(Case(**SMALL, layout=PADDED), body)


def test_combine_behind_a_failed_dispatch_reads_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has written its record: what is there names rows far behind the tensor."""
    monkeypatch.setattr(EmulatedBackend, "settle", lambda _: None)  # the host runs ahead

    def body(session: LowLatencySession) -> None:
        dispatch_on_all(session)
        if session.rank == 1:
            session.group.barrier()
            return
        sent = session.low_latency_dispatch(1, return_hook=True).actual
        session.backend.runtime.flush()
        record = sent.handle.records
        places = record.map.record
        record.words[places.entries - session.group.size :] = (1 << 26) - 1
        record.words[places.turn + 4 : places.entries - session.group.size] = 0
        sent.hook()
        session.buffer.low_latency_combine(sent.x, sent.handle)
        session.backend.runtime.flush()
        with pytest.raises(CommTimeout, match="rank 1"):
            session.backend.low_latency.check()
        session.group.barrier()

    play(Case(**SMALL, layout=PADDED), body)


@pytest.mark.parametrize("stop_at_ns", [0, 3_000, 20_000, 60_000, 150_000, 300_000])
def test_rank_stopped_midway_never_hangs(stop_at_ns: int) -> None:
    """Wherever it stops, the others finish or time out, and what they delivered is right."""

    def body(session: LowLatencySession) -> str:
        try:
            for round_idx in range(4):
                session.low_latency_combine(session.low_latency_dispatch(round_idx))
        except CommTimeout as error:
            return f"timeout {error.peer}"
        except RankStopped:
            return "stopped"
        return "done"

    for seed in range(4):
        faults = Faults(stop_rank=1, stop_at_ns=stop_at_ns)
        outcomes = play(Case(**SMALL, layout=PADDED, wire="fp8"), body, Settings(seed, faults))
        assert outcomes[0] in ("timeout 1", "done")
        assert outcomes[1] in ("stopped", "done")


@pytest.mark.parametrize("layout", [PADDED, TOKEN])
@pytest.mark.parametrize("use_hook", [False, True])
def test_rank_that_never_comes_is_masked(layout: RecvLayout, use_hook: bool) -> None:
    absent = 2
    case = Case(num_ranks=3, num_tokens=6, hidden=64, layout=layout, routing="uniform", num_topk=4)
    options: dict[str, Any] = {"on_timeout": "mask", "return_hook": use_hook}

    def body(session: LowLatencySession) -> None:
        session.low_latency_combine(session.low_latency_dispatch(0, on_timeout="mask"))
        if session.rank == absent:
            session.group.barrier()
            return
        waits = torch.zeros(case.num_ranks, dtype=torch.int64)
        one = session.low_latency_dispatch(1, masked={absent}, wait_us_stats=waits, **options)
        one.finish()
        assert waits[absent] >= 1_000_000
        assert max(waits[:absent]) < 1_000_000
        assert session.buffer.rank_mask().tolist() == [False, False, True]
        for _ in range(5):
            session.low_latency_combine(one, masked={absent}, **options).finish()
        session.group.barrier()

    play(case, body)


@pytest.mark.parametrize("layout", [PADDED, TOKEN])
@pytest.mark.parametrize("wire", ["bf16", "fp8"])
def test_masked_rank_counts_as_absent(layout: RecvLayout, wire: Any) -> None:
    absent = 1
    case = Case(num_ranks=3, num_tokens=6, hidden=64, layout=layout, num_topk=4, wire=wire)

    def body(session: LowLatencySession) -> None:
        if session.rank == absent:
            return
        session.buffer.set_rank_mask(absent, True)
        for round_idx in range(6):
            one = session.low_latency_dispatch(round_idx, masked={absent}, zero_padding=True)
            session.low_latency_combine(one, masked={absent}, carried=True, apply_weights=False)

    play(case, with_reserved_memory(body))


def with_reserved_memory(body: Any) -> Any:
    """Let all ranks reserve the slots, which is collective, before the body."""

    def all_ranks(session: LowLatencySession) -> Any:
        session.low_latency_dispatch(0)
        return body(session)

    return all_ranks


def test_mask_set_between_dispatch_and_combine() -> None:
    absent = 2

    def body(session: LowLatencySession) -> None:
        one = session.low_latency_dispatch(0)
        if session.rank != absent:
            session.buffer.set_rank_mask(absent, True)
            session.low_latency_combine(one, masked={absent})

    play(Case(num_ranks=3, num_tokens=6, hidden=64, layout=PADDED, num_topk=4), body)


def test_rank_is_not_taken_back_between_send_and_hook() -> None:
    case = Case(num_ranks=4, num_tokens=6, hidden=64, layout=PADDED, num_topk=4, routing="uniform")
    play(case, take_back_in_flight)


@pytest.mark.parametrize("seed", range(4))
def test_rank_can_be_taken_back(seed: int) -> None:
    cut = 1
    case = Case(num_ranks=3, num_tokens=6, hidden=64, layout=PADDED, num_topk=4, routing="uniform")

    def body(session: LowLatencySession) -> None:
        go_apart(session, other_side(session, cut))

    play(case, body, Settings(seed))


@pytest.mark.parametrize("loses_sums", [False, True], ids=["rows", "sums"])
@pytest.mark.parametrize("num_apart", [1, 2, 4, 6])  # of 4 slots
@pytest.mark.parametrize("wire", ["bf16", "fp8"])
def test_rows_that_nobody_has_read_are_not_those_of_a_later_turn(
    wire: Any, num_apart: int, loses_sums: bool
) -> None:
    case = Case(num_ranks=3, num_tokens=6, hidden=64, layout=PADDED, num_topk=4, wire=wire)

    def body(session: LowLatencySession) -> None:
        leave_unread(session, 1, num_apart, loses_sums)

    for seed in range(3):
        play(case, body, Settings(seed))


@pytest.mark.parametrize("cut", [None, 1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_an_operation_is_called_off_with_all_slots_in_flight(seed: int, cut: int | None) -> None:
    case = Case(
        num_ranks=3, num_tokens=6, even=True, hidden=64, layout=PADDED, num_topk=4, wire="fp8"
    )
    play(case, lambda session: refuse_in_flight(session, cut), Settings(seed))


@pytest.mark.parametrize("seed", range(4))
def test_rank_is_taken_back_after_hooks_on_another_stream(seed: int) -> None:
    case = Case(num_ranks=3, num_tokens=6, hidden=64, layout=PADDED, num_topk=4)
    settings = Settings(seed, has_network=True)  # which has a stream of its own
    play(case, lambda session: take_back_beside(session, 1), settings)


# ---- statistics ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_expert_token_stats_add_up(dtype: torch.dtype) -> None:
    case = Case(**SMALL, layout=PADDED)

    def body(session: LowLatencySession) -> None:
        stats = torch.full((case.experts_per_rank,), 100, dtype=dtype)
        expected = stats.clone()
        for round_idx in range(3):
            one = session.low_latency_dispatch(
                round_idx, expert_token_stats=stats, return_hook=round_idx == 1
            )
            one.finish()
            expected += one.expected[session.rank].num_tokens_per_expert
        assert torch.equal(stats, expected)

    play(case, body)


def test_wait_us_stats_name_the_late_source() -> None:
    case = Case(num_ranks=3, num_tokens=4, hidden=64, layout=PADDED)

    def body(session: LowLatencySession) -> list[list[int]]:
        waits = [torch.zeros(case.num_ranks, dtype=torch.int64) for _ in range(2)]
        one = session.low_latency_dispatch(0, wait_us_stats=waits[0])
        session.low_latency_combine(one, wait_us_stats=waits[1])
        return [wait.tolist() for wait in waits]

    faults = Faults(delay_rank=2, delay_from_ns=0, delay_for_ns=400_000_000)
    waits = play(case, body, Settings(3, faults))[0][0]
    assert waits[2] > 300_000
    assert max(waits[:2]) < 100_000
