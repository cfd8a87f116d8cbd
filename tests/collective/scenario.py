# SPDX-License-Identifier: Apache-2.0
"""Scenarios: what all ranks of a case do, the same in threads and in processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from collective.case import DTYPES
from collective.session import Session

from deepcomm import InvalidArgument, RecvLayout

if TYPE_CHECKING:
    from collections.abc import Iterable

    from collective.case import Case
    from collective.session import Oracle


def spoil(session: Session, num_rounds: int = 4) -> None:
    """Leave NaN in every landing area and low-latency slot that the case will use."""
    case, buffer = session.case, session.buffer
    shape = (case.num_tokens, case.hidden)
    dtype = DTYPES.get(case.wire, torch.bfloat16)
    x = torch.full(shape, torch.nan, dtype=dtype, device=case.device)
    ids = torch.arange(case.num_topk, device=case.device) + session.rank * case.experts_per_rank
    ids = (ids % case.num_experts).repeat(case.num_tokens, 1)
    weights = torch.full(ids.shape, torch.nan, device=case.device)
    scales = "ue8m0" if case.wire.endswith("ue8m0") else "fp32"
    quantize = {} if case.wire in DTYPES else {"quantize": "fp8_e4m3", "scale_format": scales}
    for _ in range(num_rounds):
        received = buffer.dispatch(x, ids, weights, recv_layout=case.layout, owned=True, **quantize)
        y = torch.full_like(received.x, torch.nan, dtype=case.y_dtype)
        buffer.combine(y, received.handle, topk_weights=received.topk_weights)
    if case.layout is RecvLayout.EXPERT or buffer.config.num_low_latency_slots == 0:
        return
    for _ in range(num_rounds):
        received = buffer.low_latency_dispatch(x, ids, weights, recv_layout=case.layout, **quantize)
        y = torch.full_like(received.x, torch.nan, dtype=case.y_dtype)
        buffer.low_latency_combine(y, received.handle)


def exchange(group: Any, case: Case, oracle: Oracle | None = None, **options: Any) -> None:
    """High throughput: every kind of dispatch and combine once, on spoilt memory."""
    with Session(group, case, oracle, **options) as session:
        exchange_in(session)


def exchange_in(session: Session) -> None:
    """The same in a session, whose buffer then knows all landing areas."""
    case = session.case
    spoil(session)
    first = session.dispatch(0, zero_padding=True)
    if case.wire in DTYPES:
        session.combine(first, in_place=True)
    session.combine(first)
    session.combine(first, carried=True, extras=True)
    other = session.dispatch(1, has_weights=False)
    if case.layout is not RecvLayout.TOKEN:
        session.combine(first, apply_weights=True, extras=True)
    again = session.dispatch(2, cached=first)
    session.combine(other, carried=True)
    session.combine(again, apply_weights=case.layout is not RecvLayout.TOKEN)
    session.combine(first)
    session.dispatch(3, cached=again, has_weights=False)


def low_latency_exchange(group: Any, case: Case, oracle: Oracle | None = None) -> None:
    """Low latency: the same, with three operations in flight."""
    with Session(group, case, oracle) as session:
        spoil(session)
        first = session.low_latency_dispatch(0, zero_padding=True)
        session.low_latency_combine(first, extras=True)
        flying = [session.low_latency_dispatch(i, return_hook=True) for i in (1, 2)]
        back = session.low_latency_combine(
            first, carried=True, apply_weights=False, return_hook=True
        )
        for operation in (*flying, back):
            operation.finish()
        bare = session.low_latency_dispatch(3, has_weights=False, return_hook=True)
        returning = [
            session.low_latency_combine(
                flight, override=case.layout is not RecvLayout.TOKEN, return_hook=True
            )
            for flight in flying
        ]
        for operation in (bare, *returning):
            operation.finish()
        session.low_latency_combine(bare, apply_weights=False)


def other_side(session: Session, cut: int) -> list[int]:
    """Return the ranks that a rank is apart from, where one is cut off."""
    return [rank for rank in range(session.group.size) if (rank == cut) != (session.rank == cut)]


def take_back(session: Session, ranks: Iterable[int], rounds: Iterable[int]) -> None:
    """Take ranks back, which do the same, and compare rounds of all."""
    for rank in ranks:
        session.buffer.set_rank_mask(rank, False)
    session.group.barrier()
    for round_idx in rounds:
        session.low_latency_combine(session.low_latency_dispatch(round_idx))


def go_apart(session: Session, others: list[int]) -> None:
    """Mask the ranks of the other side, which does the same, and take them back."""
    session.low_latency_combine(session.low_latency_dispatch(0))
    for rank in others:
        session.buffer.set_rank_mask(rank, True)
    for round_idx in range(1, 4):  # both sides go on by themselves
        own = session.inputs(round_idx)
        got = session.buffer.low_latency_dispatch(session._own(own.xs), session._own(own.ids))
        session.buffer.low_latency_combine(got.x, got.handle, apply_weights=False)
    take_back(session, others, range(4, 10))


def take_back_in_flight(session: Session) -> None:
    """Let pairs of ranks mask each other, and take each other back once no hook is awaited."""
    buffer, peer = session.buffer, session.rank ^ 1
    own = session.inputs(0)
    session.low_latency_combine(session.low_latency_dispatch(0))
    buffer.set_rank_mask(peer, True)
    x, ids = session._own(own.xs), session._own(own.ids)
    got = buffer.low_latency_dispatch(x, ids, recv_layout=session.case.layout, return_hook=True)
    with pytest.raises(InvalidArgument, match=r"masked: expected True .* 1 low-latency"):
        buffer.set_rank_mask(peer, False)
    assert buffer.rank_mask()[peer]
    buffer.set_rank_mask(peer, True)  # as it is
    assert got.hook is not None
    got.hook()
    buffer.set_rank_mask(peer, False)
    session.group.barrier()
    session.low_latency_combine(session.low_latency_dispatch(1))


def lose_after_dispatch(session: Session, absent: int, *, override: bool) -> None:
    """Go on with low latency without a rank that leaves after a dispatch: it is masked."""
    one = session.low_latency_dispatch(0)
    if session.rank != absent:
        for _ in range(2):
            session.low_latency_combine(one, masked={absent}, override=override, on_timeout="mask")
        again = session.low_latency_dispatch(1, masked={absent}, on_timeout="mask")
        session.low_latency_combine(again, masked={absent}, on_timeout="mask")
    session.group.barrier()
