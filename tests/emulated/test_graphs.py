# SPDX-License-Identifier: Apache-2.0
"""Operations that are launched again as a graph does it, beside operations outside of it."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from collective.case import Case
from collective.session import Oracle, Session
from emulated.conftest import Schedules
from emulated.runtime import LazyKernel, LazyRuntime, locals_of_backend, run_emulated, use_runtime

from deepcomm import InvalidArgument, RecvLayout

if TYPE_CHECKING:
    from deepcomm.backends.cuda.runtime import KernelParams
    from deepcomm.testing import LocalGroup

pytestmark = pytest.mark.emulated_backend

SMALL = Case(num_ranks=3, num_tokens=4, even=True, routing="uniform")
MAX_ROWS = SMALL.num_ranks * SMALL.num_tokens
CAPACITIES = {RecvLayout.TOKEN: MAX_ROWS, RecvLayout.EXPERT: MAX_ROWS * SMALL.num_topk}


class Recorded:
    """A copy of a kernel's argument."""

    def __init__(self, params: KernelParams) -> None:
        self._bytes = ctypes.create_string_buffer(
            ctypes.string_at(params.address, params.num_bytes), params.num_bytes
        )
        self.address = ctypes.addressof(self._bytes)
        self.num_bytes = params.num_bytes


class CapturingRuntime(LazyRuntime):
    """Records launches instead of doing them, with what they point to."""

    def __init__(self, runtime: Any) -> None:
        super().__init__(runtime)
        self._launches: list[tuple[LazyKernel, int, Recorded]] = []
        self._held: list[dict[str, Any]] = []

    def is_capturing(self) -> bool:
        return True

    def launch(self, function: LazyKernel, grid: int, params: KernelParams) -> None:
        self._launches.append((function, grid, Recorded(params)))
        self._held += locals_of_backend()

    def replay(self) -> None:
        for function, grid, params in self._launches:
            self.actual.launch(function, grid, params)
        self.actual.flush()


@contextlib.contextmanager
def capture(session: Session) -> Iterator[CapturingRuntime]:
    """Record the operations of the block."""
    actual = session.buffer._backend.runtime  # type: ignore[attr-defined]
    graph = CapturingRuntime(actual)
    use_runtime(session.buffer, graph)
    try:
        yield graph
    finally:
        use_runtime(session.buffer, actual)


def dispatch(session: Session, x: torch.Tensor, ids: torch.Tensor) -> Any:
    """Dispatch so that no host waits."""
    layout = session.case.layout
    return session.buffer.dispatch(
        x, ids, recv_layout=layout, num_recv_tokens=CAPACITIES.get(layout)
    )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone().view(torch.int16)


@pytest.mark.parametrize("num_generations", [2, 3])
@pytest.mark.parametrize("layout", RecvLayout)
def test_replay_leaves_views_alone_whose_graph_has_dropped_its_own(
    schedules: Schedules, layout: RecvLayout, num_generations: int
) -> None:
    case, oracle = replace(SMALL, layout=layout), Oracle()
    token, options = replace(case, layout=RecvLayout.TOKEN), {"num_low_latency_slots": 0}

    def play(group: LocalGroup) -> None:
        with Session(group, token, oracle, **options, num_generations=num_generations) as session:
            held = session.dispatch(0).actual  # before the capture
            session.case = case
            inputs = session.inputs(3)
            with capture(session) as graph:
                dispatch(session, inputs.xs[group.rank], inputs.ids[group.rank])
            session.case = token
            views = [held, *(session.dispatch(i).actual for i in range(1, num_generations))]
            del held
            kept = [bits(view.x) for view in views]
            for i in range(num_generations, num_generations + 3):
                graph.replay()
                for view, rows in zip(views, kept, strict=True):
                    assert torch.equal(bits(view.x), rows)
                views.pop(0)
                views.append(session.dispatch(i).actual)
                kept = [*kept[1:], bits(views[-1].x)]

    for settings in schedules():
        run_emulated(play, case.num_ranks, settings)


def test_replay_brings_what_its_inputs_hold(schedules: Schedules) -> None:
    case, oracle = SMALL, Oracle()

    def play(group: LocalGroup) -> None:
        rank = group.rank
        with Session(group, case, oracle, num_low_latency_slots=0) as session:
            x, ids = session.inputs(0).xs[rank].clone(), session.inputs(0).ids[rank].clone()
            with capture(session) as graph:
                captured = dispatch(session, x, ids)
            for round_idx in range(3):
                inputs = session.inputs(round_idx)
                x.copy_(inputs.xs[rank])
                ids.copy_(inputs.ids[rank])
                graph.replay()
                outside = session.dispatch(round_idx).actual  # lands elsewhere
                num_rows = int(captured.num_recv_tokens)
                assert num_rows == len(outside.x)
                assert torch.equal(bits(captured.x[:num_rows]), bits(outside.x))
                assert torch.equal(captured.topk_idx[:num_rows], outside.topk_idx)

    for settings in schedules():
        run_emulated(play, case.num_ranks, settings)


def test_capture_raises_nothing_and_refuses_what_would_wait(schedules: Schedules) -> None:
    """What a graph's replay finds wrong is raised by the next call outside."""
    case, oracle = SMALL, Oracle()

    def play(group: LocalGroup) -> None:
        rank = group.rank
        with Session(group, case, oracle, num_low_latency_slots=0) as session:
            x, ids = session.inputs(0).xs[rank], session.inputs(0).ids[rank].clone()
            with capture(session) as graph:
                dispatch(session, x, ids)
            ids[0, 0] = case.num_experts
            graph.replay()
            with capture(session):
                dispatch(session, x, ids)
                with pytest.raises(InvalidArgument, match="expected a capacity while"):
                    session.buffer.dispatch(x, ids)
            ids[0, 0] = ids[0, 1] = -1
            with pytest.raises(Exception, match="topk_idx: expected ids"):
                dispatch(session, x, ids)
            graph.replay()
            session.dispatch(0)

    for settings in schedules():
        run_emulated(play, case.num_ranks, settings)
