# SPDX-License-Identifier: Apache-2.0
"""What the ranks of ``test_low_latency`` do: everything once, flights, and a graph with hooks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from collective.case import make_outputs
from collective.session import Oracle, Session
from gpu.backend_ranks import TIMEOUT_S, meet

from deepcomm import CommTimeout, RecvLayout, reference
from deepcomm.group import as_group
from deepcomm.testing.oracle import assert_combine_equal, assert_dispatch_equal, poison

if TYPE_CHECKING:
    from collections.abc import Sequence

    from collective.case import Case, Inputs

    from deepcomm.types import CombineOutput, DispatchOutput


def fly_all(group: Any, cases: Sequence[Case], oracle: Oracle | None = None) -> None:
    """Run every kind of operation of every case, several in flight, and compare."""
    for case in cases:
        with Session(group, case, oracle, timeout_s=TIMEOUT_S) as session:
            try:
                fly(session)
            except AssertionError as error:
                raise AssertionError(f"{case.id}: {error}") from error


def fly(session: Session) -> None:
    """More operations than slots; hooks in other orders than sends."""
    by_expert = session.case.layout is not RecvLayout.TOKEN
    for start in (0, 10, 20):
        flying = [session.low_latency_dispatch(start + i, return_hook=True) for i in range(3)]
        for i in (1, 0, 2):
            flying[i].finish()
        back = [
            session.low_latency_combine(
                flying[i], override=by_expert and i == 1, extras=i == 2, return_hook=True
            )
            for i in range(3)
        ]
        for i in (2, 0, 1):
            back[i].finish()
        bare = session.low_latency_dispatch(start + 3, has_weights=False, zero_padding=True)
        session.low_latency_combine(bare, carried=True, apply_weights=False)
        session.low_latency_combine(flying[0], carried=True, apply_weights=False)


@dataclass(eq=False)
class Replay:
    """What all ranks should get in a replay."""

    received: list[Any]
    ys: list[Any]
    back: list[Any]


def expected_of(case: Case, inputs: Inputs, round_idx: int) -> Replay:
    received: list[Any] = reference.low_latency_dispatch(
        inputs.xs, inputs.ids, inputs.weights, config=case.config, recv_layout=case.layout
    )
    ys = [make_outputs(case, output, rank, round_idx) for rank, output in enumerate(received)]
    handles = [output.handle for output in received]
    return Replay(received, ys, reference.low_latency_combine(ys, handles))


def replay(group: Any, case: Case, num_replays: int, oracle: Oracle | None = None) -> int:
    """Capture sends and hooks, replay them with other rows and ids, and compare."""
    with Session(group, case, Oracle(), timeout_s=TIMEOUT_S) as session:
        shared, rank = oracle or Oracle(), session.rank
        eager = session.low_latency_dispatch(0)  # reserves the slots
        session.low_latency_combine(eager)
        inputs, y = session.inputs(0), torch.zeros_like(eager.actual.x)
        given = [session._own(part) for part in (inputs.xs, inputs.ids, inputs.weights)]
        graph, received, back = capture(session, group, given, y)
        for round_idx in range(1, num_replays + 1):
            inputs = session.inputs(round_idx)
            expected = shared.get(
                ("graph", round_idx),
                lambda round_idx=round_idx, inputs=inputs: expected_of(case, inputs, round_idx),
            )
            for tensor, parts in zip(
                (*given, y), (inputs.xs, inputs.ids, inputs.weights, expected.ys), strict=True
            ):
                tensor.copy_(parts[rank])
            poison(back.x)
            graph.replay()
            torch.cuda.current_stream().synchronize()
            assert_dispatch_equal(received, expected.received[rank], rank=rank)
            assert_combine_equal(back, expected.back[rank], rank=rank)
            # What follows a replay outside of graphs takes the turn after it.
            session.low_latency_combine(session.low_latency_dispatch(round_idx))
        del graph
    return num_replays


def capture(
    session: Session, group: Any, given: list[torch.Tensor], y: torch.Tensor
) -> tuple[torch.cuda.CUDAGraph, DispatchOutput, CombineOutput]:
    """Record the operations, one rank after the other where they share a process."""
    graph, results = torch.cuda.CUDAGraph(), ()
    for turn in range(session.case.num_ranks):
        meet(group)
        if turn != session.rank:
            continue
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
            received = session.buffer.low_latency_dispatch(
                *given, recv_layout=session.case.layout, return_hook=True
            )
            assert received.hook is not None
            received.hook()
            back = session.buffer.low_latency_combine(y, received.handle, return_hook=True)
            assert back.hook is not None
            back.hook()
            results = (received, back)
    meet(group)
    return (graph, *results)  # type: ignore[return-value]


def miss_a_peer(group: Any, case: Case) -> int | None:
    """Let the last rank stay away from a dispatch; return whom the others name."""
    peer: int | None = None
    with Session(group, case, timeout_s=1.0) as session:
        session.low_latency_combine(session.low_latency_dispatch(0))
        meet(group)
        if session.rank < case.num_ranks - 1:
            inputs = session.inputs(1)
            x, ids = session._own(inputs.xs), session._own(inputs.ids)
            try:
                session.buffer.low_latency_dispatch(
                    x, ids, recv_layout=case.layout, async_op=True
                ).event.synchronize()
            except CommTimeout as error:
                peer = error.peer
        as_group(group).all_gather(None)
    return peer
