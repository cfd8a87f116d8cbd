# SPDX-License-Identifier: Apache-2.0
"""What the ranks of ``test_rails`` do beside what those of ``test_backend`` do."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from collective.nodes import bytes_to_other_nodes
from collective.session import Session
from gpu.backend_ranks import OPTIONS, TIMEOUT_S, meet, short_timeout_s

from deepcomm import CommError, CommTimeout, InvalidArgument
from deepcomm.group import as_group

if TYPE_CHECKING:
    from collections.abc import Callable

    from collective.case import Case

NUM_ROUNDS = 20
NUM_REFUSALS = 8


def count_bytes(group: Any, case: Case) -> None:
    """Each row crosses once to the other node, and none inside a node of one rank."""
    with Session(group, case, **OPTIONS) as session:
        dispatched = session.dispatch(0)
        ids = dispatched.inputs.ids[session.rank]
        stats = session.buffer.stats()
        assert stats.bytes_network == bytes_to_other_nodes(case, ids, session.rank)
        assert stats.bytes_node == 0
        assert "NCCL" in session.buffer.explain()


def take_turns(group: Any, case: Case) -> int:
    """Dispatch and combine in both ways, in flight together; return the bytes on the network."""
    with Session(group, case, timeout_s=TIMEOUT_S) as session:
        for round_idx in range(NUM_ROUNDS):
            flying = [
                session.low_latency_dispatch(round_idx + i, return_hook=True, async_op=i == 1)
                for i in range(2)
            ]
            high = session.dispatch(round_idx)
            flying[1].finish()
            back = session.low_latency_combine(flying[1], override=True, return_hook=True)
            session.combine(high)
            flying[0].finish()
            session.low_latency_combine(flying[0], async_op=True)
            back.finish()
        return session.buffer.stats().bytes_network


def refuse_in_turn(group: Any, case: Case) -> int:
    """Let the last rank call with wrong arguments; all hear of it, and the buffer goes on."""
    count = 0
    with Session(group, case, timeout_s=TIMEOUT_S) as session:
        one = session.low_latency_dispatch(0)
        for call in refused_calls(session, one) * 2:
            error = InvalidArgument if session.rank == case.num_ranks - 1 else CommError
            with pytest.raises(error):
                call()
            meet(group)
            count += 1
            session.low_latency_combine(one, override=count % 2 == 0)
            one = session.low_latency_dispatch(count)
    return count


def refused_calls(session: Session, one: Any) -> list[Callable[[], None]]:
    """Return calls that the last rank gets wrong, each until its error is there."""
    buffer, rank = session.buffer, session.rank
    is_wrong = rank == session.case.num_ranks - 1
    inputs = session.inputs(1)
    x, ids, weights = map(session._own, (inputs.xs, inputs.ids, inputs.weights))
    layout = {"recv_layout": session.case.layout}
    narrow, y = x[:, :-8] if is_wrong else x, one.actual.x
    short = y[:1] if is_wrong else y
    wrong_ids = ids.clone()
    if is_wrong:
        wrong_ids[0, 0] = session.case.num_experts

    def dispatch(rows: Any, routing: Any, **options: Any) -> None:
        output = buffer.low_latency_dispatch(rows, routing, **layout, **options)
        if output.hook is not None:
            output.hook()
        settle(session)

    def combine(**options: Any) -> None:
        buffer.low_latency_combine(short, one.actual.handle, **options)
        settle(session)

    return [
        lambda: dispatch(narrow, ids, return_hook=True),
        lambda: dispatch(x, wrong_ids),
        lambda: combine(apply_weights=False),
        lambda: combine(topk_weights=weights),
    ]


def settle(session: Session) -> None:
    """Raise what the operations so far have found to be wrong."""
    torch.cuda.synchronize()
    backend: Any = session.buffer._backend
    backend._low_latency.check()


def miss_a_peer(group: Any, case: Case, how: str) -> float | None:
    """Let the last rank stay away; return after how long the others raise."""
    elapsed_s: float | None = None
    with Session(group, case, timeout_s=short_timeout_s(case)) as session:
        one = session.low_latency_dispatch(0)
        session.low_latency_combine(one, override=True)
        meet(group)
        if session.rank < case.num_ranks - 1:
            begin_s = time.monotonic()
            with pytest.raises(CommTimeout):
                come_alone(session, one, how)
            elapsed_s = time.monotonic() - begin_s
        as_group(group).all_gather(None)
    return elapsed_s


def come_alone(session: Session, one: Any, how: str) -> None:
    """Run an operation until its error is there."""
    buffer = session.buffer
    if how in ("combine", "weights"):
        weights = session._own(session.inputs(0).weights) if how == "weights" else None
        options: dict[str, Any] = {"topk_weights": weights, "apply_weights": weights is not None}
        output: Any = buffer.low_latency_combine(
            one.actual.x, one.actual.handle, async_op=True, **options
        )
    else:
        inputs = session.inputs(1)
        x, ids = session._own(inputs.xs), session._own(inputs.ids)
        output = buffer.low_latency_dispatch(
            x, ids, recv_layout=session.case.layout, async_op=True, return_hook=how == "hook"
        )
        if how == "hook":
            output.hook()
            # The send is over long before; what is received never comes.
            buffer.low_latency_dispatch(x, ids, recv_layout=session.case.layout, async_op=True)
    output.event.synchronize()
    await_failure(session)
    buffer.low_latency_combine(one.actual.x, one.actual.handle, apply_weights=False)


def await_failure(session: Session) -> None:
    """Wait until the host has heard of what the device or the network has run into."""
    backend: Any = session.buffer._backend
    limit_s = time.monotonic() + 4 * short_timeout_s(session.case)
    while not backend.failure.failed and time.monotonic() < limit_s:
        time.sleep(0.1)
