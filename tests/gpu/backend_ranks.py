# SPDX-License-Identifier: Apache-2.0
"""What the ranks of ``test_backend`` do, the same in threads and in processes.

Nothing blocks for ever: waits of the device end after ``TIMEOUT_S``, those of the control plane
with the group's own.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from collective.scenario import exchange_in
from collective.session import Oracle, Session

from deepcomm import CommTimeout, RecvLayout
from deepcomm.event import CudaEvent
from deepcomm.group import as_group
from deepcomm.testing.oracle import ROUTING_KINDS, assert_dispatch_equal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from collective.case import Case, Wire

TIMEOUT_S = 20.0
OPTIONS: dict[str, Any] = {"timeout_s": TIMEOUT_S, "num_low_latency_slots": 0}
WIRES: tuple[Wire, ...] = ("bf16", "fp8", "fp8_ue8m0", "scaled", "scaled_ue8m0")
SLEEP_CYCLES = 20_000_000
SOAK_SEED = 20_261


def meet(group: Any) -> None:
    """Wait on the host for all ranks, once this rank's device is idle."""
    torch.cuda.current_stream().synchronize()
    as_group(group).all_gather(None)


def in_process(group: Any, body: Callable[..., Any], *args: Any) -> Any:
    """Run ``body`` on the GPU of this process's rank."""
    torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    return body(group, *args)


# ---- Everything once ------------------------------------------------------------------------


def exchange_all(group: Any, cases: Sequence[Case], oracle: Oracle | None = None) -> None:
    """Run every kind of operation of every case, and compare."""
    for case in cases:
        with Session(group, case, oracle, **OPTIONS) as session:
            try:
                exchange_in(session)
                own_and_overlap(session)
            except AssertionError as error:
                raise AssertionError(f"{case.id}: {error}") from error


def own_and_overlap(session: Session) -> None:
    """Owned results, results in the caller's tensors, and operations on their own stream."""
    owned = session.dispatch(4, owned=True)
    views = [session.dispatch(5 + i) for i in range(3)]  # more than may stay views
    for dispatched in (owned, *views):
        assert_dispatch_equal(
            dispatched.actual, dispatched.expected[session.rank], rank=session.rank
        )
        session.combine(dispatched)
    room = torch.empty_like(owned.actual.x)
    into = session.dispatch(4, out=room)
    assert into.actual.x.data_ptr() == room.data_ptr()
    flying = session.dispatch(8, async_op=True)
    session.combine(flying, carried=True, async_op=True)
    flying.actual.event.synchronize()
    assert flying.actual.event.query()


def exchange_with_sms(group: Any, case: Case, nums_sms: Sequence[int]) -> None:
    """The same with other numbers of SMs, alike on all ranks and not: bit for bit alike."""
    rank = as_group(group).rank
    for first in range(len(nums_sms)):
        for num_sms in (nums_sms[first], nums_sms[(first + rank) % len(nums_sms)]):
            with Session(group, case, num_sms=num_sms, **OPTIONS) as session:
                exchange_in(session)


def wait_for_previous_event(group: Any, case: Case) -> None:
    """Rows that another stream is still writing are sent once its event says so."""
    with Session(group, case, **OPTIONS) as session:
        buffer, rank = session.buffer, session.rank
        first = session.dispatch(0)
        x = session._own(session.inputs(0).xs)
        late = torch.zeros_like(x)
        ids = session._own(session.inputs(0).ids)
        weights = session._own(session.inputs(0).weights)
        meet(group)
        writer = torch.cuda.Stream()
        with torch.cuda.stream(writer):
            torch.cuda._sleep(SLEEP_CYCLES)
            late.copy_(x)
            written = CudaEvent.record(buffer.device)
        output = buffer.dispatch(
            late, ids, weights, recv_layout=case.layout, async_op=True, previous_event=written
        )
        output.event.synchronize()
        assert_dispatch_equal(output, first.expected[rank], rank=rank)
        back = buffer.combine(output.x, output.handle, async_op=True, previous_event=output.event)
        again = buffer.combine(output.x, output.handle)
        back.event.current_stream_wait()
        assert torch.equal(back.x, again.x)


def grow(group: Any, case: Case) -> None:
    """A buffer for few tokens takes more; a view of before stays what it was."""
    small = {"max_tokens_per_rank": case.num_tokens // 8, "growable": True}
    with Session(group, case, **small, **OPTIONS) as session:
        buffer = session.buffer
        few = torch.full((4, case.hidden), 3.0, dtype=torch.bfloat16, device=case.device)
        ids = torch.arange(4, device=case.device)[:, None] % case.num_experts
        before = buffer.dispatch(few, ids)
        kept = before.x.clone()
        exchange_in(session)
        assert buffer.config.max_tokens_per_rank >= case.num_tokens
        assert torch.equal(before.x, kept)
        back = buffer.combine(before.x, before.handle)
        assert torch.equal(back.x, few)


# ---- Many rounds ----------------------------------------------------------------------------


def random_case(base: Case, random: np.random.Generator) -> Case:
    """Return a case for the buffer of ``base``, with other sizes and options."""
    layout = list(RecvLayout)[random.integers(3)]
    has_capacity = layout is not RecvLayout.EXPERT_PADDED and random.random() < 0.4
    sizes = random.integers(0, base.num_tokens + 1, base.num_ranks)
    sizes[random.random(base.num_ranks) < 0.1] = 0
    return replace(
        base,
        layout=layout,
        wire=WIRES[random.integers(len(WIRES))],
        routing=ROUTING_KINDS[random.integers(len(ROUTING_KINDS))],
        num_topk=int(random.integers(1, base.num_topk + 1)),
        sizes=tuple(int(size) for size in sizes),
        id_dtype=(torch.int32, torch.int64)[random.integers(2)],
        alignment=int(random.integers(1, 20)) if layout is RecvLayout.EXPERT else 1,
        capacity=int(random.integers(0, base.num_tokens * 4)) if has_capacity else None,
        strided=bool(random.random() < 0.2),
    )


def soak(group: Any, base: Case, num_rounds: int, oracle: Oracle | None = None) -> int:
    """Run rounds of random sizes, options and routings; return the number of results compared."""
    random = np.random.default_rng(SOAK_SEED)  # the same choices on all ranks
    kept = None
    with Session(group, base, oracle, **OPTIONS) as session:
        for round_idx in range(num_rounds):
            session.case = random_case(base, random)
            try:
                dispatched = soak_round(session, round_idx, num_rounds, random)
                if kept is not None:  # a view that was leased during the round
                    assert_dispatch_equal(
                        kept.actual, kept.expected[session.rank], rank=session.rank
                    )
            except AssertionError as error:
                what = f"round {round_idx} of seed {SOAK_SEED}, {session.case}"
                raise AssertionError(f"{what}: {error}") from error
            kept = dispatched if random.random() < 0.5 else None
        return session.step


def soak_round(
    session: Session, round_idx: int, num_rounds: int, random: np.random.Generator
) -> Any:
    """Run a dispatch, perhaps a repetition of it, and one or two combines."""
    choices = random.random(6) < 0.4
    has_weights, by_expert = not choices[0], session.case.layout is not RecvLayout.TOKEN
    options = {"owned": bool(choices[1]), "async_op": bool(choices[2])}
    dispatched = session.dispatch(
        round_idx, has_weights=has_weights, zero_padding=bool(choices[3]), **options
    )
    if choices[4]:
        dispatched = session.dispatch(
            round_idx + num_rounds, cached=dispatched, has_weights=has_weights
        )
    session.combine(dispatched, carried=bool(choices[5]), extras=bool(choices[0]))
    if by_expert and has_weights:
        session.combine(dispatched, apply_weights=True, async_op=bool(choices[1]))
    return dispatched


def reserved_bytes(group: Any, case: Case, num_rounds: int) -> list[int]:
    """Return torch's reserved memory after each tenth of many alike rounds."""
    reserved = []
    with Session(group, case, **OPTIONS) as session:
        for round_idx in range(num_rounds):
            session.rewind(0)
            first = session.dispatch(0)
            session.combine(first, carried=True)
            session.combine(session.dispatch(1, cached=first))
            session.dispatch(2, owned=True)
            del first
            if round_idx % (num_rounds // 10) == num_rounds // 10 - 1:
                meet(group)
                reserved.append(torch.cuda.memory_reserved())
                meet(group)
    return reserved


# ---- A rank that does not come --------------------------------------------------------------


def short_timeout_s(case: Case) -> float:
    """Return a timeout for a peer that will not come; a network takes some seconds to be made."""
    return {"nccl": 4.0, "gin": 8.0}.get(case.rail, 1.0)


def miss_a_peer(group: Any, case: Case, how: str) -> float:
    """Let rank 1 stay away from an operation; return how long rank 0 took to find out."""
    elapsed_s = 0.0
    with Session(group, case, **{**OPTIONS, "timeout_s": short_timeout_s(case)}) as session:
        first = session.dispatch(0)
        meet(group)
        if session.rank == 0:
            start = time.monotonic()
            error = error_of(lambda: lonely_operation(session, first, how))
            elapsed_s = time.monotonic() - start
            assert isinstance(error, CommTimeout), repr(error)
            assert error.peer == 1, str(error)
            check_ruin(session, first)
        as_group(group).all_gather(None)
    if as_group(group).rank == 0:
        assert int(torch.arange(1000, device=case.device).sum()) == 499_500
    return elapsed_s


def lonely_operation(session: Session, first: Any, how: str) -> None:
    """Run an operation and wait for it."""
    case, buffer, inputs = session.case, session.buffer, session.inputs(0)
    if how == "combine":
        y = torch.ones_like(first.actual.x)
        buffer.combine(y, first.actual.handle, async_op=True).event.synchronize()
        return
    capacity = case.num_tokens * case.num_ranks if how == "capacity" else None
    x, ids = (tensors[session.rank].to(case.device) for tensors in (inputs.xs, inputs.ids))
    output = buffer.dispatch(
        x, ids, recv_layout=case.layout, num_recv_tokens=capacity, async_op=True
    )
    output.event.synchronize()


def check_ruin(session: Session, first: Any) -> None:
    """After a timeout nothing runs, CUDA computes, and the buffer can only be closed."""
    torch.cuda.synchronize()
    assert int(torch.arange(1000, device=session.case.device).sum()) == 499_500
    error = error_of(lambda: lonely_operation(session, first, "exact"))
    assert "can only be closed" in str(error), repr(error)


def lose_a_peer(group: Any, case: Case) -> float:
    """Let rank 1's process end; return how long rank 0 took to find out."""
    import os

    session = Session(group, case, **{**OPTIONS, "timeout_s": short_timeout_s(case)})
    first = session.dispatch(0)
    meet(group)
    if session.rank == 1:
        os._exit(3)
    start = time.monotonic()
    error = error_of(lambda: lonely_operation(session, first, "exact"))
    elapsed_s = time.monotonic() - start
    assert isinstance(error, CommTimeout), repr(error)
    check_ruin(session, first)
    session.buffer.close()
    session.buffer.close()
    return elapsed_s


def error_of(call: Callable[[], Any]) -> BaseException | None:
    """Return what a call raises."""
    try:
        call()
    except Exception as error:  # noqa: BLE001  # the caller looks at it
        return error
    return None
