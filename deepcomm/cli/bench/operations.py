# SPDX-License-Identifier: Apache-2.0
"""What is timed and checked: the operations of deepcomm, as a user calls them."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from deepcomm.cli.bench.verify import check_combine, check_dispatch, expert_output_
from deepcomm.types import SCALE_TILE, RecvLayout

if TYPE_CHECKING:
    from collections.abc import Callable

    from deepcomm.buffer import Buffer
    from deepcomm.cli.bench.workload import Arrivals, Workload
    from deepcomm.types import CombineOutput, DispatchOutput

__all__ = ["Kind", "Operation", "list_operations", "row_bytes"]

COMBINE_ROUNDINGS = 4
"""A rank's, a node's and the whole sum are rounded to BF16; one more for the FP32 sums."""


class Kind(enum.Enum):
    """What an operation does; contenders that do the same are of one kind."""

    DISPATCH = "dispatch BF16"
    DISPATCH_FP8 = "dispatch FP8"
    CACHED_DISPATCH = "cached dispatch BF16"
    COMBINE = "combine BF16"


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """A timed operation: steps that each get the previous one's result.

    Attributes:
        name: Unique in a run.
        kind: What it is compared with.
        steps: Name and function of each; with more than one, each is also timed on its own.
        check: Raises ``verify.Mismatch`` for a wrong result.
        repeats: How often a call does the work; its time is divided by that.
    """

    name: str
    kind: Kind
    steps: tuple[tuple[str, Callable[[Any], Any]], ...]
    check: Callable[[Any], None]
    repeats: int = 1

    def run(self) -> Any:
        """Run all steps and return the last one's result."""
        result: Any = None
        for _, step in self.steps:
            result = step(result)
        return result


def row_bytes(kind: Kind, hidden: int) -> int:
    """Return the payload bytes of a row: BF16 elements, or FP8 elements and FP32 scales."""
    if kind is Kind.DISPATCH_FP8:
        return hidden + -(-hidden // SCALE_TILE) * 4
    return hidden * 2


def list_operations(workload: Workload, buffer: Buffer) -> list[Operation]:
    """Return deepcomm's operations on one workload; collective, as the combines need a dispatch."""
    if workload.config.low_latency:
        return _low_latency(workload, buffer)
    return _high_throughput(workload, buffer)


def _high_throughput(workload: Workload, buffer: Buffer) -> list[Operation]:
    x, routed, config = workload.x, workload.routed, workload.config
    dispatch = partial(
        buffer.dispatch, x, routed.topk_idx, routed.topk_weights, recv_layout=config.recv_layout
    )
    first = dispatch()
    # Checked here as well: in memory that no earlier dispatch of the same rows has touched.
    check_dispatch(workload, first)
    y = _run_experts(first.x, workload)
    received = workload.arrivals.index
    first.x[received] = y[received]
    combine = partial(
        buffer.combine, handle=first.handle, apply_weights=_applies_weights(config.recv_layout)
    )
    cached = partial(buffer.dispatch, x, topk_weights=routed.topk_weights, handle=first.handle)
    operations = [_dispatch(workload, Kind.DISPATCH, _single(dispatch))]
    if config.fp8:
        fused = partial(dispatch, quantize="fp8_e4m3")
        operations.append(_dispatch(workload, Kind.DISPATCH_FP8, _single(fused)))
    return [
        *operations,
        _dispatch(workload, Kind.CACHED_DISPATCH, _single(cached)),
        _combine(workload, "combine BF16", _single(partial(combine, y))),
        _combine(workload, "combine BF16 in place", _single(partial(combine, first.x))),
    ]


def _low_latency(workload: Workload, buffer: Buffer) -> list[Operation]:
    """Return the split-phase operations; they receive into kept tensors, as decoders do."""
    x, routed, config = workload.x, workload.routed, workload.config
    send = partial(
        buffer.low_latency_dispatch,
        x,
        routed.topk_idx,
        routed.topk_weights,
        recv_layout=config.recv_layout,
        return_hook=True,
    )
    first = _receive(send())
    check_dispatch(workload, first)
    send = partial(send, out=torch.empty_like(first.x))
    send_back = partial(
        buffer.low_latency_combine,
        _run_experts(first.x, workload),
        first.handle,
        apply_weights=_applies_weights(config.recv_layout),
        return_hook=True,
    )
    operations = [_dispatch(workload, Kind.DISPATCH, _two_phases(send))]
    if config.fp8:
        fp8_out = torch.empty_like(first.x, dtype=torch.float8_e4m3fn)
        fused = partial(send, quantize="fp8_e4m3", out=fp8_out)
        operations.append(_dispatch(workload, Kind.DISPATCH_FP8, _two_phases(fused)))
    return [*operations, _combine(workload, "combine BF16", _two_phases(send_back))]


def _dispatch(workload: Workload, kind: Kind, steps: _Steps) -> Operation:
    return Operation(kind.value, kind, steps, partial(check_dispatch, workload))


def _combine(workload: Workload, name: str, steps: _Steps) -> Operation:
    def check(output: CombineOutput) -> None:
        weighted = _applies_weights(workload.config.recv_layout)
        check_combine(workload, output.x, weighted=weighted, num_roundings=COMBINE_ROUNDINGS)

    return Operation(name, Kind.COMBINE, steps, check)


def _applies_weights(layout: RecvLayout) -> bool:
    # Rows of TOKEN stand for several experts: their weights belong into the expert computation.
    return layout is not RecvLayout.TOKEN


def _run_experts(x: torch.Tensor, workload: Workload) -> torch.Tensor:
    """Return an ordinary tensor like ``x`` with the experts' outputs in the rows received."""
    received: Arrivals = workload.arrivals
    y = torch.empty_like(x)
    y[received.index] = expert_output_(x[received.index], workload.rank)
    return y


_Steps = tuple[tuple[str, "Callable[[Any], Any]"], ...]


def _single(call: Callable[[], Any]) -> _Steps:
    return (("call", lambda _: call()),)


def _two_phases(send: Callable[[], Any]) -> _Steps:
    return (("send", lambda _: send()), ("hook", _receive))


def _receive(output: DispatchOutput | CombineOutput) -> Any:
    if output.hook is None:
        raise RuntimeError("return_hook=True gave no hook")
    output.hook()
    return output
