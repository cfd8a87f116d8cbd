# SPDX-License-Identifier: Apache-2.0
"""One low-latency operation, ready to launch: arguments, tensors, outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from deepcomm.backends.cuda.low_latency_slots import BOTH, RECEIVE, SEND, Slots
from deepcomm.backends.cuda.low_latency_status import COMBINE, DISPATCH, pack_signature
from deepcomm.backends.cuda.low_latency_tensors import (
    DispatchTensors,
    Record,
    Sizes,
    address_of,
    aligned,
    row_kind,
    wire_of,
)
from deepcomm.checks import check_combine, check_dispatch, check_length
from deepcomm.errors import InvalidArgument
from deepcomm.types import CombineOutput, DispatchOutput, Handle, RecvLayout

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from deepcomm._C import kernels
    from deepcomm.backends.base import CombineRequest, DispatchRequest
    from deepcomm.backends.cuda.functions import LowLatencyFunctions
    from deepcomm.backends.cuda.runtime import Function
    from deepcomm.checks import CheckedCombine, CheckedDispatch
    from deepcomm.config import BufferConfig
    from deepcomm.types import Event

__all__ = ["CombineOperation", "Context", "DispatchOperation"]


@dataclass(frozen=True, slots=True)
class Context:
    """What operations of one buffer share.

    Attributes:
        no_overflow: False, for outputs that never overflow.
    """

    slots: Slots
    functions: LowLatencyFunctions
    config: BufferConfig
    sizes: Sizes
    num_ranks: int
    buffer_id: bytes
    no_overflow: torch.Tensor


class DispatchOperation:
    """A dispatch whose arguments are right.

    Attributes:
        params: Of the kernels; they hold addresses of ``tensors``.
        functions: By phase.
        num_blocks: Blocks that each phase would like.
        tensors: What the kernels read and write.
    """

    name = DISPATCH

    def __init__(self, context: Context, request: DispatchRequest) -> None:
        """Check and allocate.

        Raises:
            InvalidArgument: The first argument that is wrong.
        """
        self._context = context
        self._checked = checked = self._check(request)
        self._made = DispatchTensors.allocate(request, checked, context.sizes)
        self._record = Record.make(
            context.buffer_id,
            (context.num_ranks, context.config.max_tokens_per_rank, checked.num_topk),
            context.sizes.device,
        )
        kind = row_kind(checked)
        wire = wire_of(kind)
        self.functions: dict[int, Function] = context.functions.dispatch[kind]
        num_tokens, num_rows = checked.num_tokens, context.sizes.block_rows
        self.num_blocks = {
            SEND: num_tokens + 1,
            RECEIVE: num_rows,
            BOTH: max(num_tokens + 1, num_rows),
        }
        rows = aligned(checked.rows)
        self.params = self._fill(request, rows, wire)
        made = self._made
        self.tensors: Sequence[torch.Tensor | None] = (
            *(rows, checked.scales, checked.topk_idx, checked.topk_weights, self._record.words),
            *(made.x, made.scales, made.topk_idx, made.topk_weights, made.ints),
            *(made.topk_idx_copy, made.topk_weights_copy),
        )

    @property
    def num_tokens(self) -> int:
        """T."""
        return self._checked.num_tokens

    def _check(self, request: DispatchRequest) -> CheckedDispatch:
        context, config = self._context, self._context.config
        checked = check_dispatch(request, config, context.sizes.device)
        if checked.scale_format == "none" and checked.rows.dtype != torch.bfloat16:
            raise InvalidArgument(
                f"x: expected bfloat16 [T, {config.hidden}] or a ScaledTensor, "
                f"got {str(checked.rows.dtype).removeprefix('torch.')}"
            )
        if checked.num_tokens > config.max_tokens_per_rank:
            raise InvalidArgument(
                f"x: expected at most max_tokens_per_rank = {config.max_tokens_per_rank} "
                f"tokens, got {checked.num_tokens}"
            )
        check_length(
            "expert_token_stats", request.expert_token_stats, context.sizes.num_local_experts
        )
        check_length("wait_us_stats", request.wait_us_stats, context.num_ranks)
        return checked

    def _fill(
        self, request: DispatchRequest, rows: torch.Tensor, wire: int
    ) -> kernels.LowLatencyDispatchParams:
        checked, record = self._checked, self._record
        params = self._context.slots.dispatch_params.copy()
        base = params.base
        is_token = checked.recv_layout is RecvLayout.TOKEN
        base.signature = pack_signature(
            recv_layout=is_token,
            rows=wire,
            topk_weights=checked.topk_weights is not None,
            K=checked.num_topk,
        )
        base.num_topk = checked.num_topk
        base.num_tokens = checked.num_tokens
        base.mask_late = request.on_timeout == "mask"
        record.fill(base)
        base.turn = base.record + 4 * record.map.turn
        params.topk_idx = address_of(checked.topk_idx)
        params.topk_idx_is_int64 = checked.id_dtype == torch.int64
        params.topk_weights = address_of(checked.topk_weights)
        params.is_token_layout = is_token
        params.x = address_of(rows)
        params.x_stride = rows.stride(0) * rows.element_size()
        if checked.scales is not None:
            params.scales = address_of(checked.scales)
            params.scale_stride = checked.scales.stride(0)
        if request.wait_us_stats is not None:
            base.wait_us = address_of(request.wait_us_stats)
        if request.expert_token_stats is not None:
            params.expert_token_stats = address_of(request.expert_token_stats)
            params.stats_is_int64 = request.expert_token_stats.dtype == torch.int64
        self._made.fill(params)
        return params

    def on_received(self) -> None:
        """Note that combines may follow."""
        self._record.is_complete = True

    def output(self, event: Event | None, hook: Callable[[], None] | None) -> DispatchOutput:
        """Return what the caller gets."""
        checked, made, sizes = self._checked, self._made, self._context.sizes
        is_token = checked.recv_layout is RecvLayout.TOKEN
        handle = Handle(
            recv_layout=checked.recv_layout,
            expert_alignment=1,
            capacity=None,
            num_tokens=checked.num_tokens,
            num_rows=sizes.block_rows * (1 if is_token else sizes.num_local_experts),
            topk_idx=made.topk_idx_copy,
            topk_weights=made.topk_weights_copy,
            low_latency=True,
            records=self._record,
        )
        return DispatchOutput(
            x=made.x,
            scales=made.scales,
            topk_idx=made.topk_idx,
            topk_weights=made.topk_weights,
            num_tokens_per_expert=made.ints[:-1],
            expert_offsets=None,
            num_recv_tokens=made.ints[-1],
            overflow=self._context.no_overflow,
            handle=handle,
            event=event,
            hook=hook,
        )


class CombineOperation:
    """A combine whose arguments are right; attributes as those of ``DispatchOperation``."""

    name = COMBINE

    def __init__(self, context: Context, request: CombineRequest) -> None:
        """Check and allocate.

        Raises:
            InvalidArgument: The first argument that is wrong.
        """
        self._context = context
        self._checked = checked = self._check(request)
        self._record = Record.of(request.handle, context.buffer_id)
        self.functions: dict[int, Function] = context.functions.combine
        num_rows, num_tokens = context.sizes.block_rows, request.handle.num_tokens
        self.num_blocks = {SEND: num_rows, RECEIVE: num_tokens, BOTH: num_rows}
        device = context.sizes.device
        self._x = request.out
        if self._x is None:
            self._x = torch.empty(
                num_tokens, context.config.hidden, dtype=torch.bfloat16, device=device
            )
        self._weights: torch.Tensor | None = None
        if checked.carried is not None:
            num_topk = int(request.handle.topk_idx.shape[1])
            self._weights = torch.empty(num_tokens, num_topk, device=device)
        turn = torch.empty(4, dtype=torch.int32, device=device) if request.return_hook else None
        rows = aligned(checked.rows)
        bias = None if checked.bias is None else aligned(checked.bias)
        self.params = self._fill(request, rows, bias)
        self.params.base.turn = address_of(turn)
        self.tensors: Sequence[torch.Tensor | None] = (
            *(rows, checked.carried, checked.source_weights, bias, self._record.words),
            *(request.handle.topk_idx, self._x, self._weights, turn),
        )

    def _check(self, request: CombineRequest) -> CheckedCombine:
        context = self._context
        sizes = context.sizes
        checked = check_combine(request, context.config, sizes.num_local_experts, sizes.device)
        check_length("wait_us_stats", request.wait_us_stats, context.num_ranks)
        if checked.rows.dtype != torch.bfloat16:
            dtype = str(checked.rows.dtype).removeprefix("torch.")
            raise InvalidArgument(f"y: expected bfloat16, got {dtype}")
        if request.out is not None and request.out.data_ptr() % 4:
            raise InvalidArgument("out: expected it to begin at a multiple of 4 bytes")
        return checked

    def _fill(
        self, request: CombineRequest, rows: torch.Tensor, bias: torch.Tensor | None
    ) -> kernels.LowLatencyCombineParams:
        checked, handle = self._checked, request.handle
        params = self._context.slots.combine_params.copy()
        base = params.base
        is_token = handle.recv_layout is RecvLayout.TOKEN
        num_topk = int(handle.topk_idx.shape[1])
        base.signature = pack_signature(
            operation=1,
            recv_layout=is_token,
            topk_weights=checked.source_weights is not None or checked.carried is not None,
            apply_weights=checked.apply_weights,
            K=num_topk,
        )
        base.num_topk = num_topk
        base.num_tokens = handle.num_tokens
        base.mask_late = request.on_timeout == "mask"
        base.wait_us = address_of(request.wait_us_stats)
        self._record.fill(base)
        params.topk_idx = address_of(handle.topk_idx)
        params.source_weights = address_of(checked.source_weights)
        params.carried = address_of(checked.carried)
        params.out_topk_weights = address_of(self._weights)
        params.apply_weights = checked.apply_weights
        params.is_token_layout = is_token
        params.out = address_of(self._x)
        params.y = address_of(rows)
        params.y_stride = rows.stride(0) * rows.element_size()
        if bias is not None:
            params.bias = address_of(bias)
            params.bias_stride = bias.stride(0) * bias.element_size()
        return params

    def on_received(self) -> None:
        """Nothing to note."""

    def output(self, event: Event | None, hook: Callable[[], None] | None) -> CombineOutput:
        """Return what the caller gets."""
        assert self._x is not None
        return CombineOutput(self._x, self._weights, event, hook)


def is_known_record(request: Any) -> Record | None:
    """Return the record of a combine's handle if it can be trusted."""
    handle = getattr(request, "handle", None)
    record = handle.records if isinstance(handle, Handle) else None
    return record if isinstance(record, Record) and record.is_complete else None
