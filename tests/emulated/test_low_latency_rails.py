# SPDX-License-Identifier: Apache-2.0
"""Low latency over rails that a network carries, which is late and out of order.

Cases and oracle are those of nodes that reach each other (``test_low_latency_nodes.py``, which also
has the refusals of both).
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import pytest
from collective.case import Case
from collective.nodes import LOW_LATENCY_CASES, LOW_LATENCY_SLOW_CASES, LOW_LATENCY_TWO_BY_TWO
from collective.scenario import exchange_in
from collective.session import Oracle, Session
from emulated.cluster import Settings
from emulated.host_api import Faults
from emulated.low_latency import (
    LowLatencySession,
    combine_what_cancels,
    flights,
    outcome_of_rounds,
    play,
    use_small_blocks,
)
from emulated.runtime import run_emulated
from emulated.test_low_latency import all_operations
from emulated.test_low_latency_nodes import fly
from emulated.test_low_latency_nodes_peers import WAYS, come_alone

from deepcomm import CommTimeout, ConfigMismatch, InvalidArgument, RecvLayout, buffer_bytes
from deepcomm.backends.cuda import low_latency_carrier
from deepcomm.backends.cuda.network import Message
from deepcomm.testing import LocalGroup

pytestmark = pytest.mark.emulated_backend

TOKEN, _, PADDED = RecvLayout
CARRIED: dict[str, Any] = {"rail": "nccl"}
PADDED_CASE = replace(LOW_LATENCY_TWO_BY_TWO, layout=PADDED)
THREE_BY_TWO = replace(PADDED_CASE, num_ranks=6, num_tokens=3)
PAIR = replace(PADDED_CASE, num_ranks=2, ranks_per_node=1)
SEEDS = 4


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_blocks(monkeypatch)


@pytest.mark.parametrize("case", LOW_LATENCY_CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("seed", range(2))
def test_results_over_a_network_equal_the_reference(case: Case, seed: int) -> None:
    play(case, all_operations, Settings(seed, num_sms=1 + seed), **CARRIED)


@pytest.mark.slow  # other rows than bf16 and cast to FP8
@pytest.mark.parametrize("case", LOW_LATENCY_SLOW_CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("seed", range(SEEDS))
def test_all_results_over_a_network_equal_the_reference(case: Case, seed: int) -> None:
    play(case, all_operations, Settings(seed, num_sms=1 + seed % 3), **CARRIED)


@pytest.mark.parametrize("case", [PADDED_CASE, THREE_BY_TWO], ids=lambda case: case.id)
@pytest.mark.parametrize("layout", [PADDED, TOKEN])
def test_sums_over_a_network_are_in_order(layout: RecvLayout, case: Case) -> None:
    case = replace(case, layout=layout, num_topk=6, routing="uniform")
    play(case, combine_what_cancels, **CARRIED)


# The network of rank r runs on stream r + num_ranks.
DELAYS = {
    "none": Faults(),
    "rank": Faults(delay_rank=1, delay_from_ns=50_000, delay_for_ns=300_000),
    "network": Faults(delay_rank=5, delay_from_ns=50_000, delay_for_ns=300_000),
    "rail": Faults(slow_src=4, slow_dst=2, slow_extra_ns=100_000),
    "rail-back": Faults(slow_src=6, slow_dst=0, slow_extra_ns=300_000),
    "inside": Faults(slow_src=2, slow_dst=3, slow_extra_ns=50_000),
}


@pytest.mark.parametrize("delay", DELAYS)
@pytest.mark.parametrize("seed", range(SEEDS))
def test_flights_over_a_network_overlap(delay: str, seed: int) -> None:
    settings = Settings(seed, DELAYS[delay], num_sms=1 + seed % 3)
    play(PADDED_CASE, fly, settings, **CARRIED)


@pytest.mark.parametrize("case", [PADDED_CASE, PAIR], ids=lambda case: case.id)
@pytest.mark.parametrize("seed", range(SEEDS))
def test_slots_are_used_again(case: Case, seed: int) -> None:
    """With more operations than slots, ranks may be a slot's turn apart."""
    settings = Settings(seed, num_sms=2 + seed % 2)
    play(case, flights, settings, num_low_latency_slots=3, **CARRIED)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_nodes_may_call_all_hooks_in_different_orders(seed: int) -> None:
    """What crosses has been sent before: also a combine's hook is tied to its node alone."""

    def body(session: LowLatencySession) -> None:
        order = (2, 0, 1) if session.rank < 2 else (1, 2, 0)
        flying = [session.low_latency_dispatch(i, return_hook=True) for i in range(3)]
        for i in order:
            flying[i].finish()
        back = [session.low_latency_combine(one, return_hook=True) for one in flying]
        for i in order:
            back[i].finish()

    play(PADDED_CASE, body, Settings(seed), **CARRIED)


def test_worked_example_of_carried_slots() -> None:
    """A mirror is the peer's region of it, and own credits are those of the rail's ranks."""

    def body(session: LowLatencySession) -> None:
        session.low_latency_dispatch(0)
        slots, own = session.backend.low_latency._open("test").slots, session.rank
        places, peer = slots.map, 1 - own
        num_bytes = places.region_bytes()
        mirror = ctypes.string_at(slots.local + places.mirror_offset(0, 0), num_bytes)
        region = ctypes.string_at(slots.local + places.header_offset(0, peer), num_bytes)
        everything = session.group.all_gather((mirror, region))
        assert everything[peer] == (region, mirror)
        assert any(mirror)
        session.low_latency_dispatch(1)  # which gives the first one's credits
        for slot, expected in ((0, 1), (1, 0)):
            for rank in (own, peer):
                at = slots.local + places.credit_offset(slot, rank)
                assert ctypes.c_uint64.from_address(at).value == expected

    play(PAIR, body, **CARRIED)


# ---- what goes wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("case", [PADDED_CASE, PAIR], ids=lambda case: case.id)
def test_rank_that_does_not_come_over_a_network_times_out(case: Case, how: str) -> None:
    absent = case.num_ranks - 1

    def body(session: LowLatencySession) -> None:
        one = session.low_latency_dispatch(0)
        session.low_latency_combine(one)
        if session.rank != absent:
            with pytest.raises(CommTimeout):
                come_alone(session, one, how)
            with pytest.raises(CommTimeout):
                session.low_latency_dispatch(2)
        session.group.barrier()

    play(case, body, **CARRIED)


@pytest.mark.parametrize("stop_at_ns", [0, 60_000, 150_000, 300_000])
@pytest.mark.parametrize("stopped", [3, 7])
def test_what_stops_midway_never_hangs(stopped: int, stop_at_ns: int) -> None:
    """A rank, or its network alone: the others finish or time out, and what they have is right."""
    faults = Faults(stop_rank=stopped, stop_at_ns=stop_at_ns)
    outcomes = play(PADDED_CASE, outcome_of_rounds, Settings(0, faults), **CARRIED)
    assert set(outcomes) <= {"timeout", "done", "stopped"}
    assert "stopped" not in outcomes[:3]
    assert outcomes == ["done"] * 4 or "timeout" in outcomes


def test_network_that_does_not_end_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while nobody waits for it on the device: a hook has yet to be called."""
    monkeypatch.setattr(low_latency_carrier, "PATIENCE", 0)

    def body(session: LowLatencySession) -> None:
        low_latency = session.backend.low_latency
        watched: list[Any] = []
        network = low_latency._place.network
        network.watch = lambda has_failed, _: watched.append(has_failed)  # type: ignore[union-attr]
        session.low_latency_dispatch(0)
        (has_failed,) = watched
        assert not has_failed()
        if session.rank == 0:
            flying = session.low_latency_dispatch(1, return_hook=True)
            carrier = low_latency._open("test").carrier
            assert carrier is not None
            # Two moves have begun, one has ended.
            record = low_latency._place.failure.record_device_address
            runtime = session.backend.runtime
            assert runtime.wait_word(carrier._progress.address, 2 + (1 << 32), record, 0.1)
            assert has_failed()
            with pytest.raises(CommTimeout, match="the network did not end"):
                flying.actual.hook()
        session.group.barrier()

    play(PAIR, body, **CARRIED)


def test_rank_in_another_operation_ends_it_everywhere() -> None:
    """As on any rail: who waits for what does not come runs out of time."""

    def body(session: LowLatencySession) -> None:
        one = session.low_latency_dispatch(0)
        with pytest.raises((ConfigMismatch, CommTimeout)):
            go_astray(session, one)
        session.group.barrier()

    play(PADDED_CASE, body, **CARRIED)


def go_astray(session: LowLatencySession, one: Any) -> None:
    """Dispatch on one rank while the others combine."""
    if session.rank == 1:
        session.low_latency_dispatch(1)
    else:
        session.low_latency_combine(one)


def test_masks_are_refused() -> None:
    """A network waits for all of its ranks; a refused call is told to all of them."""

    def body(session: LowLatencySession) -> None:
        one = session.low_latency_dispatch(0)
        with pytest.raises(InvalidArgument, match="rail: expected 'lsa' to mask ranks"):
            session.buffer.set_rank_mask(1 - session.rank % 2, True)
        with pytest.raises(InvalidArgument, match="on_timeout: expected 'raise' where a network"):
            session.low_latency_dispatch(1, on_timeout="mask")
        with pytest.raises(InvalidArgument, match="on_timeout: expected 'raise' where a network"):
            session.low_latency_combine(one, on_timeout="mask")
        session.low_latency_combine(one)

    play(PADDED_CASE, body, **CARRIED)


# ---- what a whole buffer knows of it -----------------------------------------------------------


def run_carried(function: Any, case: Case) -> None:
    run_emulated(function, case.num_ranks, Settings(has_network=True))


def test_buffer_counts_what_is_carried_and_reserves_it_in_one_block() -> None:
    def count(group: LocalGroup) -> None:
        with Session(group, PADDED_CASE, Oracle(), **CARRIED) as session:
            low_latency: Any = session.buffer._backend._low_latency
            moves: list[Message] = []
            move = low_latency._place.network.move
            low_latency._place.network.move = lambda messages: (
                moves.extend(messages) or move(messages)
            )
            one = session.low_latency_dispatch(0)
            session.low_latency_combine(one, override=True)
            carrier = low_latency._open("test").carrier
            block, sent = carrier.block, 0
            for message in moves:
                for span in (*message.sends, *message.receives):
                    end = span.address + span.num_bytes
                    assert block.address <= span.address < end <= block.address + block.num_bytes
                sent += sum(span.num_bytes for span in message.sends)
            assert [len(moves), session.buffer.stats().bytes_network] == [3, sent]
            assert session.buffer.num_bytes == sizes_of(PADDED_CASE).total

    run_carried(count, PADDED_CASE)


def sizes_of(case: Case) -> Any:
    return buffer_bytes(
        num_ranks=case.num_ranks,
        hidden=case.hidden,
        max_tokens_per_rank=case.num_tokens,
        num_experts=case.num_experts,
        num_topk=case.num_topk,
        ranks_per_node=case.ranks_per_node,
        device="cuda",
        **CARRIED,
    )


def test_buffer_carries_both_kinds_of_operations_and_grows() -> None:
    """They share the network, and its order."""

    def grow(group: LocalGroup) -> None:
        options = {**CARRIED, "max_tokens_per_rank": 3, "growable": True}
        with Session(group, case, oracle, **options) as session:
            inputs, rank = session.inputs(0), group.rank
            with pytest.raises(InvalidArgument, match="expected at most max_tokens_per_rank"):
                session.buffer.low_latency_dispatch(inputs.xs[rank], inputs.ids[rank])
            session.combine(session.dispatch(0))
            flying = session.low_latency_dispatch(1, return_hook=True)
            session.combine(session.dispatch(2))
            flying.finish()
            session.low_latency_combine(flying, async_op=True)
            exchange_in(session)

    case, oracle = replace(PADDED_CASE, even=True), Oracle()
    run_carried(grow, case)


def test_graph_of_carried_operations_is_refused() -> None:
    def refuse(group: LocalGroup) -> None:
        with Session(group, PAIR, Oracle(), **CARRIED) as session:
            one = session.low_latency_dispatch(0)
            flying = session.low_latency_dispatch(1, return_hook=True)
            inputs, rank = session.inputs(0), group.rank
            group.runtime.is_capturing = lambda: True  # type: ignore[method-assign, union-attr]
            with pytest.raises(InvalidArgument, match="rail: expected 'lsa' while a CUDA graph"):
                flying.actual.hook()
            with pytest.raises(InvalidArgument, match="rail: expected 'lsa' while a CUDA graph"):
                session.buffer.low_latency_dispatch(inputs.xs[rank], inputs.ids[rank])
            with pytest.raises(InvalidArgument, match="rail: expected 'lsa' while a CUDA graph"):
                session.buffer.low_latency_combine(one.actual.x, one.actual.handle)
            group.runtime.is_capturing = lambda: False  # type: ignore[method-assign, union-attr]
            flying.finish()
            session.low_latency_combine(flying)

    run_carried(refuse, PAIR)
