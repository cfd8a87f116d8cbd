# SPDX-License-Identifier: Apache-2.0
"""One low-latency operation, ready to launch: a plan, tensors, outputs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Final

from deepcomm._C import slots
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

    from deepcomm._C import kernels
    from deepcomm.backends.base import CombineRequest, DispatchRequest
    from deepcomm.backends.cuda.low_latency_plan import Inputs
    from deepcomm.types import CombineOutput, DispatchOutput, Event

__all__ = ["CombineOperation", "Context", "DispatchOperation", "known_record"]


@dataclass(slots=True, eq=False)
class DispatchOperation:
    """A dispatch whose arguments are right.

    Attributes:
        plan: Decides all but addresses.
        params: Of the kernels; they hold addresses of ``tensors``.
    """

    name: ClassVar = DISPATCH
    turn: ClassVar[None] = None  # in the record

    plan: DispatchPlan
    params: kernels.LowLatencyDispatchParams
    inputs: Inputs
    x: torch.Tensor
    scales: torch.Tensor | None
    topk_idx: torch.Tensor | None
    record: Record
    no_overflow: torch.Tensor

    @staticmethod
    def of(context: Context, request: DispatchRequest) -> DispatchOperation:
        """Check and allocate.

        Raises:
            InvalidArgument: The first argument that is wrong.
        """
        plan, inputs = DispatchPlan.of(context, request)
        outputs = plan.outputs
        x, scales, topk_idx, words = outputs.allocate()
        if request.out is not None:
            x = outputs.rows(request.out)
        record = pack_record(context.buffer_id, words, outputs.map)
        # Only an operation in flight needs arguments of its own: a launch copies them.
        params = plan.params.copy() if request.return_hook else plan.params
        params.set_outputs(x, scales, topk_idx, words, outputs.map.offsets)
        if request.wait_us_stats is not None:
            params.base.wait_us = address_of(request.wait_us_stats)
        if request.expert_token_stats is not None:
            params.expert_token_stats = address_of(request.expert_token_stats)
        return pack_dispatch(plan, params, inputs, x, scales, topk_idx, record, context.no_overflow)

    @property
    def tensors(self) -> Sequence[torch.Tensor | None]:
        """What the kernels read and write, statistics apart."""
        return (*self.inputs, self.x, self.scales, self.topk_idx, self.record.words)

    def on_received(self) -> None:
        """Note that combines may follow."""
        self.record.is_complete = True

    def output(self, event: Event | None, hook: Callable[[], None] | None) -> DispatchOutput:
        """Return what the caller gets."""
        handle = pack_handle(self.record)
        return pack_output(
            handle, self.x, self.scales, self.topk_idx, self.no_overflow, event, hook
        )


@dataclass(slots=True, eq=False)
class CombineOperation:
    """A combine whose arguments are right; attributes as those of ``DispatchOperation``.

    Attributes:
        turn: Which the send phase tells the receive phase, where there are two.
    """

    name: ClassVar = COMBINE

    plan: CombinePlan
    params: kernels.LowLatencyCombineParams
    inputs: Inputs
    record: Record
    x: torch.Tensor
    topk_weights: torch.Tensor | None
    turn: torch.Tensor | None

    @staticmethod
    def of(context: Context, request: CombineRequest) -> CombineOperation:
        """Check and allocate.

        Raises:
            InvalidArgument: The first argument that is wrong.
        """
        plan, inputs = CombinePlan.of(context, request)
        record = Record.of(request.handle, context.buffer_id)
        x = plan.x() if request.out is None else request.out
        topk_weights = None if plan.topk_weights is None else plan.topk_weights()
        params = plan.params.copy() if request.return_hook else plan.params
        params.set_outputs(x, record.words, record.map.offsets)
        turn: torch.Tensor | None = None
        if request.return_hook or context.sizes.num_nodes > 1:
            turn = plan.turn()
            params.base.turn = turn.data_ptr()
        operation = pack_combine(plan, params, inputs, record, x, topk_weights, turn)
        if plan.has_extras:
            operation._fill_extras(request)
        return operation

    def _fill_extras(self, request: CombineRequest) -> None:
        _, weights, bias = self.inputs
        params = self.params
        if self.topk_weights is None:
            params.source_weights = address_of(weights)
        else:
            params.carried = address_of(weights)
            params.out_topk_weights = address_of(self.topk_weights)
        params.bias = address_of(bias)
        params.base.wait_us = address_of(request.wait_us_stats)

    @property
    def tensors(self) -> Sequence[torch.Tensor | None]:
        """What the kernels read and write, statistics apart."""
        return (*self.inputs, self.record.words, self.x, self.topk_weights, self.turn)

    def on_received(self) -> None:
        """Nothing to note."""

    def output(self, event: Event | None, hook: Callable[[], None] | None) -> CombineOutput:
        """Return what the caller gets."""
        return pack_sums(self.x, self.topk_weights, event, hook)


pack_dispatch: Final[Callable[..., DispatchOperation]] = slots.maker(
    DispatchOperation, [field.name for field in fields(DispatchOperation)]
)
pack_combine: Final[Callable[..., CombineOperation]] = slots.maker(
    CombineOperation, [field.name for field in fields(CombineOperation)]
)


def known_record(request: Any, buffer_id: bytes) -> Record | None:
    """Return the record of a combine's handle if it can be trusted."""
    handle = getattr(request, "handle", None)
    record = handle.records if isinstance(handle, Handle) else None
    if not isinstance(record, Record) or record.buffer_id != buffer_id:
        return None
    return record if record.is_complete else None
