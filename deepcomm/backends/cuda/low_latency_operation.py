# SPDX-License-Identifier: Apache-2.0
"""One low-latency operation, ready to launch: a plan, tensors, outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deepcomm.backends.cuda.low_latency_plan import CombinePlan, Context, DispatchPlan
from deepcomm.backends.cuda.low_latency_status import COMBINE, DISPATCH
from deepcomm.backends.cuda.low_latency_tensors import address_of
from deepcomm.backends.cuda.low_latency_words import (
    Record,
    pack_handle,
    pack_output,
    pack_record,
    pack_sums,
)
from deepcomm.types import Handle

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from deepcomm.backends.base import CombineRequest, DispatchRequest
    from deepcomm.types import CombineOutput, DispatchOutput, Event

__all__ = ["CombineOperation", "Context", "DispatchOperation", "known_record"]


class DispatchOperation:
    """A dispatch whose arguments are right.

    Attributes:
        plan: Decides all but addresses.
        params: Of the kernels; they hold addresses of ``tensors``.
    """

    name = DISPATCH
    turn = None  # in the record
    __slots__ = ("_context", "_inputs", "_record", "_scales", "_topk_idx", "_x", "params", "plan")

    def __init__(self, context: Context, request: DispatchRequest) -> None:
        """Check and allocate.

        Raises:
            InvalidArgument: The first argument that is wrong.
        """
        self.plan, self._inputs = plan, _ = DispatchPlan.of(context, request)
        self._context = context
        outputs = plan.outputs
        self._x = outputs.x() if request.out is None else outputs.rows(request.out)
        self._scales = None if outputs.scales is None else outputs.scales()
        self._topk_idx = None if outputs.topk_idx is None else outputs.topk_idx()
        words = outputs.words()
        self._record = pack_record(context.buffer_id, words, outputs.map)
        # Only an operation in flight needs arguments of its own: a launch copies them.
        self.params = params = plan.params.copy() if request.return_hook else plan.params
        params.set_outputs(self._x, self._scales, self._topk_idx, words, outputs.map.offsets)
        if request.wait_us_stats is not None:
            params.base.wait_us = address_of(request.wait_us_stats)
        if request.expert_token_stats is not None:
            params.expert_token_stats = address_of(request.expert_token_stats)

    @property
    def tensors(self) -> Sequence[torch.Tensor | None]:
        """What the kernels read and write, statistics apart."""
        return (*self._inputs, self._x, self._scales, self._topk_idx, self._record.words)

    def on_received(self) -> None:
        """Note that combines may follow."""
        self._record.is_complete = True

    def output(self, event: Event | None, hook: Callable[[], None] | None) -> DispatchOutput:
        """Return what the caller gets."""
        handle, no_overflow = pack_handle(self._record), self._context.no_overflow
        return pack_output(handle, self._x, self._scales, self._topk_idx, no_overflow, event, hook)


class CombineOperation:
    """A combine whose arguments are right; attributes as those of ``DispatchOperation``.

    Attributes:
        turn: Which the send phase tells the receive phase, where there are two.
    """

    name = COMBINE
    __slots__ = ("_inputs", "_record", "_topk_weights", "_x", "params", "plan", "turn")

    def __init__(self, context: Context, request: CombineRequest) -> None:
        """Check and allocate.

        Raises:
            InvalidArgument: The first argument that is wrong.
        """
        self.plan, self._inputs = plan, _ = CombinePlan.of(context, request)
        self._record = record = Record.of(request.handle, context.buffer_id)
        self._x = plan.x() if request.out is None else request.out
        self._topk_weights = None if plan.topk_weights is None else plan.topk_weights()
        self.params = params = plan.params.copy() if request.return_hook else plan.params
        self.turn: torch.Tensor | None = None
        params.set_outputs(self._x, record.words, record.map.offsets)
        if request.return_hook or context.sizes.num_nodes > 1:
            self.turn = plan.turn()
            params.base.turn = self.turn.data_ptr()
        if plan.has_extras:
            self._fill_extras(request)

    def _fill_extras(self, request: CombineRequest) -> None:
        _, weights, bias = self._inputs
        params = self.params
        if self._topk_weights is None:
            params.source_weights = address_of(weights)
        else:
            params.carried = address_of(weights)
            params.out_topk_weights = address_of(self._topk_weights)
        params.bias = address_of(bias)
        params.base.wait_us = address_of(request.wait_us_stats)

    @property
    def tensors(self) -> Sequence[torch.Tensor | None]:
        """What the kernels read and write, statistics apart."""
        return (*self._inputs, self._record.words, self._x, self._topk_weights, self.turn)

    def on_received(self) -> None:
        """Nothing to note."""

    def output(self, event: Event | None, hook: Callable[[], None] | None) -> CombineOutput:
        """Return what the caller gets."""
        return pack_sums(self._x, self._topk_weights, event, hook)


def known_record(request: Any, buffer_id: bytes) -> Record | None:
    """Return the record of a combine's handle if it can be trusted."""
    handle = getattr(request, "handle", None)
    record = handle.records if isinstance(handle, Handle) else None
    if not isinstance(record, Record) or record.buffer_id != buffer_id:
        return None
    return record if record.is_complete else None
