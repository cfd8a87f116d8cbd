# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of the backend's operations: captured once, replayed with other routings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from collective.case import Inputs, make_outputs, make_row_weights
from collective.session import Oracle, Session
from gpu.backend_ranks import OPTIONS, meet

from deepcomm import RecvLayout, ScaledTensor, reference
from deepcomm.testing.oracle import assert_combine_equal, assert_dispatch_equal, poison

if TYPE_CHECKING:
    from collective.case import Case

    from deepcomm.types import CombineOutput, DispatchOutput


@dataclass(eq=False)
class Captured:
    """A graph, the tensors it reads, and the results that a replay fills again."""

    graph: torch.cuda.CUDAGraph
    x: torch.Tensor | ScaledTensor
    ids: torch.Tensor
    weights: torch.Tensor
    y: torch.Tensor
    carried: torch.Tensor | None
    received: DispatchOutput
    again: DispatchOutput
    back: CombineOutput


def replay_with_new_routings(
    group: Any, case: Case, num_replays: int, oracle: Oracle | None = None
) -> int:
    """Capture dispatch, cached dispatch and combine, and compare every replay."""
    shared = oracle or Oracle()
    with Session(group, case, Oracle(), **OPTIONS) as session:
        captured = capture(session, group, shared)
        for round_idx in range(1, num_replays + 1):
            replay(session, captured, shared, round_idx)
            # What follows a replay outside of graphs meets the same epochs.
            if round_idx % 5 == 0:
                session.combine(session.dispatch(round_idx))
        del captured
    return num_replays


def expected_of(session: Session, oracle: Oracle, round_idx: int) -> dict[str, Any]:
    """Return what all ranks bring and should get in a replay; computed once for all."""
    case, inputs = session.case, session.inputs(round_idx)

    def compute() -> dict[str, Any]:
        received = reference.dispatch(
            inputs.xs,
            inputs.ids,
            inputs.weights,
            config=case.config,
            recv_layout=case.layout,
            expert_alignment=case.alignment,
            capacities=[case.capacity] * case.num_ranks,
            **case.quantize,
        )
        handles = [output.handle for output in received]
        again = reference.dispatch(
            inputs.xs, None, inputs.weights, config=case.config, handles=handles, **case.quantize
        )
        ys = [make_outputs(case, output, rank, round_idx) for rank, output in enumerate(received)]
        carried = [make_row_weights(output, rank, 0) for rank, output in enumerate(received)]
        by_expert = case.layout is not RecvLayout.TOKEN
        back = reference.combine(
            ys, handles, topk_weights=None if by_expert else carried, apply_weights=by_expert
        )
        return {"received": received, "again": again, "ys": ys, "carried": carried, "back": back}

    result: dict[str, Any] = oracle.get(("graph", round_idx), compute)
    return result


def capture(session: Session, group: Any, oracle: Oracle) -> Captured:
    """Record the operations, one rank after the other where they share a process."""
    case, rank = session.case, session.rank
    expected, inputs = expected_of(session, oracle, 0), session.inputs(0)
    session.combine(session.dispatch(0))  # everything that happens only once
    by_expert = case.layout is not RecvLayout.TOKEN
    x, ids, weights = (session._own(part) for part in (inputs.xs, inputs.ids, inputs.weights))
    y = session._own(expected["ys"])
    carried = None if by_expert else session._own(expected["carried"])
    graph, results = torch.cuda.CUDAGraph(), ()
    layout = {"recv_layout": case.layout, "expert_alignment": case.alignment}
    for turn in range(case.num_ranks):
        meet(group)
        if turn != rank:
            continue
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
            received = session.buffer.dispatch(
                x, ids, weights, num_recv_tokens=case.capacity, **layout, **case.quantize
            )
            again = session.buffer.dispatch(
                x, None, weights, handle=received.handle, **case.quantize
            )
            back = session.buffer.combine(
                y, received.handle, topk_weights=carried, apply_weights=by_expert
            )
            results = (received, again, back)
    meet(group)
    return Captured(graph, x, ids, weights, y, carried, *results)


def replay(session: Session, captured: Captured, oracle: Oracle, round_idx: int) -> None:
    """Bring other rows and ids, poison what was received, replay, compare."""
    rank, inputs = session.rank, session.inputs(round_idx)
    expected = expected_of(session, oracle, round_idx)
    bring(captured, inputs, rank)
    captured.y.copy_(expected["ys"][rank])
    for output in (captured.received, captured.again):
        for tensor in (output.num_tokens_per_expert, output.num_recv_tokens):
            poison(tensor)
    poison(captured.back.x)
    captured.graph.replay()
    torch.cuda.current_stream().synchronize()
    try:
        assert_dispatch_equal(captured.received, expected["received"][rank], rank=rank)
        assert_dispatch_equal(captured.again, expected["again"][rank], rank=rank)
        assert_combine_equal(captured.back, expected["back"][rank], rank=rank)
    except AssertionError as error:
        raise AssertionError(f"{session.case.id}, replay {round_idx}: {error}") from error


def bring(captured: Captured, inputs: Inputs, rank: int) -> None:
    """Copy a round's inputs to where the graph reads them."""
    x = inputs.xs[rank]
    if isinstance(x, ScaledTensor):
        assert isinstance(captured.x, ScaledTensor)
        captured.x.data.view(torch.uint8).copy_(x.data.view(torch.uint8))
        captured.x.scales.copy_(x.scales)
    else:
        assert isinstance(captured.x, torch.Tensor)
        captured.x.copy_(x)
    captured.ids.copy_(inputs.ids[rank])
    captured.weights.copy_(inputs.weights[rank])


def exact_dispatch_is_refused(group: Any, case: Case) -> str:
    """Return what a dispatch without a capacity raises while a graph is captured."""
    message = ""
    with Session(group, case, **OPTIONS) as session:
        inputs = session.inputs(0)
        x, ids = session._own(inputs.xs), session._own(inputs.ids)
        session.dispatch(0)
        for turn in range(case.num_ranks):
            meet(group)
            if turn == session.rank:
                message = refusal_in_capture(session, x, ids)
        meet(group)
        session.combine(session.dispatch(1))
    return message


def refusal_in_capture(session: Session, x: torch.Tensor, ids: torch.Tensor) -> str:
    graph, message = torch.cuda.CUDAGraph(), ""
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
        try:
            session.buffer.dispatch(x, ids)
        except ValueError as error:
            message = str(error)
        x.add_(0)  # a graph of nothing draws a warning
    return message
