# SPDX-License-Identifier: Apache-2.0
"""Tensors of the CPU operations: native arguments from checked ones, and the outputs to fill.

What every call makes and drops is not frozen: that would make it three times as slow.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from deepcomm._C import cpu
from deepcomm.backends.cpu_results import OutputShape, allocate_rows, allocate_scales
from deepcomm.checks import check_out_shape
from deepcomm.errors import InvalidArgument
from deepcomm.event import CompletedEvent
from deepcomm.fp8 import num_scale_words
from deepcomm.types import DispatchOutput, Handle, RecvLayout

if TYPE_CHECKING:
    from deepcomm.backends.base import CombineRequest, DispatchRequest
    from deepcomm.checks import CheckedCombine, CheckedDispatch
    from deepcomm.types import CombineOutput

__all__ = [
    "CpuRecord",
    "DispatchTensors",
    "combine_args",
    "dispatch_args",
    "dispatch_output",
    "make_handle",
]

STREAM_BYTES = 4 << 20

DTYPES = {
    torch.bfloat16: cpu.DType.BF16,
    torch.float16: cpu.DType.F16,
    torch.float32: cpu.DType.F32,
    torch.float8_e4m3fn: cpu.DType.FP8_E4M3,
}
SCALE_FORMATS = {
    "none": cpu.ScaleFormat.NONE,
    "fp32": cpu.ScaleFormat.FP32,
    "ue8m0": cpu.ScaleFormat.UE8M0,
}
LAYOUTS = {
    RecvLayout.TOKEN: cpu.RecvLayout.TOKEN,
    RecvLayout.EXPERT: cpu.RecvLayout.EXPERT,
    RecvLayout.EXPERT_PADDED: cpu.RecvLayout.EXPERT_PADDED,
}


@dataclass(slots=True, eq=False)
class CpuRecord:
    """What a ``Handle`` keeps for the CPU backend.

    Attributes:
        native: The native record.
        id_dtype: Of ``topk_idx`` as the user gave it; outputs of cached dispatches follow it.
        buffer_id: Of the buffer, alike on its ranks: its slots mean nothing to another.
    """

    native: cpu.DispatchRecord
    id_dtype: torch.dtype
    buffer_id: bytes


def native_record(handle: Handle, buffer_id: bytes) -> cpu.DispatchRecord:
    """Return a handle's record, if it is one of the buffer's.

    Raises:
        InvalidArgument: The handle comes from another buffer.
    """
    record = handle.records
    if not isinstance(record, CpuRecord) or record.buffer_id != buffer_id:
        raise InvalidArgument("handle: expected one of this buffer, got one of another")
    return record.native


def row_dtype(checked: CheckedDispatch) -> torch.dtype:
    """Return the dtype of rows as they travel."""
    return torch.float8_e4m3fn if checked.scale_format != "none" else checked.rows.dtype


@functools.cache
def row_format(dtype: torch.dtype, scale_format: str, hidden: int) -> cpu.RowFormat:
    """Return the native format of rows as they travel."""
    return cpu.RowFormat.make(DTYPES[dtype], SCALE_FORMATS[scale_format], hidden)


@functools.lru_cache(maxsize=64)
def args_template(
    row_dtype: torch.dtype,
    scale_format: str,
    hidden: int,
    num_topk: int,
    ids_are_int64: bool,
    recv_layout: RecvLayout,
) -> cpu.DispatchArgs:
    """Return native arguments without tensors: what a program's dispatches have in common."""
    args = cpu.DispatchArgs()
    is_fp8 = scale_format != "none"
    args.input.dtype = DTYPES[row_dtype]
    args.input.quantize = is_fp8 and row_dtype != torch.float8_e4m3fn
    args.format = row_format(torch.float8_e4m3fn if is_fp8 else row_dtype, scale_format, hidden)
    args.num_topk = num_topk
    args.topk_idx_is_int64 = ids_are_int64
    args.recv_layout = LAYOUTS[recv_layout]
    return args


def dispatch_args(checked: CheckedDispatch, hidden: int) -> cpu.DispatchArgs:
    """Return the native arguments; they hold addresses of the tensors in ``checked``."""
    rows, ids, weights = checked.rows, checked.topk_idx, checked.topk_weights
    args = args_template(
        rows.dtype,
        checked.scale_format,
        hidden,
        checked.num_topk,
        checked.id_dtype is torch.int64,
        checked.recv_layout,
    ).with_tensors(
        rows.data_ptr(),
        rows.stride(0) * rows.element_size(),
        checked.num_tokens,
        0 if ids is None else ids.data_ptr(),
        0 if weights is None else address_of(weights),
    )
    if checked.scales is not None:
        given = args.input
        given.scales = checked.scales.data_ptr()
        given.scale_stride = checked.scales.stride(0) * checked.scales.element_size()
    if checked.expert_alignment != 1:
        args.expert_alignment = checked.expert_alignment
    if checked.capacity is not None:
        args.capacity = checked.capacity
    return args


def address_of(tensor: torch.Tensor) -> int:
    """Return a tensor's address; never 0, which would mean that it was not given."""
    return tensor.data_ptr() or 1


def make_handle(
    request: DispatchRequest,
    checked: CheckedDispatch,
    tensors: DispatchTensors,
    num_rows: int,
    record: CpuRecord,
) -> Handle:
    """Return the handle of a dispatch; it owns copies of what the user gave."""
    cached = request.handle
    topk_idx = tensors.rest.routed_idx
    if cached is not None:
        topk_idx = cached.topk_idx
        record = replace(record, id_dtype=cached.records.id_dtype)
    assert topk_idx is not None
    return Handle(
        recv_layout=checked.recv_layout,
        expert_alignment=checked.expert_alignment,
        capacity=checked.capacity,
        num_tokens=checked.num_tokens,
        num_rows=num_rows,
        topk_idx=topk_idx,
        topk_weights=tensors.rest.routed_weights,
        low_latency=request.low_latency,
        records=record,
    )


@dataclass(slots=True, eq=False)
class DispatchTensors:
    """Output tensors of one dispatch, allocated, to be filled by the native code.

    Attributes:
        x: The rows: a view of shared memory, or owned.
        scales: Their scales, where they have any.
        out: The user's tensor to check and fill, or None.
        rest: All others, those of the handle included.
    """

    x: torch.Tensor
    scales: torch.Tensor | None
    out: torch.Tensor | None
    rest: cpu.DispatchOutputs

    @staticmethod
    def of_dispatch(
        op: cpu.DispatchOp,
        request: DispatchRequest,
        checked: CheckedDispatch,
        endpoint: cpu.Endpoint,
    ) -> DispatchTensors:
        """Allocate for a high-throughput dispatch, or view its landing area."""
        cached = request.handle
        id_dtype = checked.id_dtype if cached is None else cached.records.id_dtype
        rest = op.make_outputs(endpoint, id_dtype is torch.int64)
        x = None if request.owned or request.out is not None else op.lease_rows()
        if x is not None and checked.scale_format == "none":
            return DispatchTensors(x, None, None, rest)
        shape = output_shape(checked, op.received.out_rows, rest.counts.shape[0])
        dtype = row_dtype(checked)
        if x is None:
            x = allocate_rows(endpoint, request.out, shape, dtype)
            point_at_rows(rest.target, x)
        else:
            x = x.view(dtype)
        return DispatchTensors(
            x, allocate_scales(endpoint, shape, request.zero_padding), request.out, rest
        )

    @staticmethod
    def of_low_latency(
        op: cpu.LowLatencyDispatchOp,
        request: DispatchRequest,
        checked: CheckedDispatch,
        endpoint: cpu.Endpoint,
    ) -> DispatchTensors:
        """Allocate for a low-latency dispatch, whose shapes are fixed."""
        rest = op.make_outputs(endpoint, checked.id_dtype is torch.int64)
        shape = output_shape(checked, op.num_out_rows, rest.counts.shape[0])
        dtype = row_dtype(checked)
        if request.out is not None:
            check_out_shape(request.out, shape.x, dtype)
        x = allocate_rows(endpoint, request.out, shape, dtype)
        point_at_rows(rest.target, x)
        return DispatchTensors(
            x, allocate_scales(endpoint, shape, request.zero_padding), request.out, rest
        )

    def target(self, zero_padding: bool) -> cpu.DeliverTarget:
        """Return where the native code writes."""
        target = self.rest.target
        if self.scales is not None:
            target.scales = address_of(self.scales)
        target.zero_padding = zero_padding
        return target

    def check_out(self) -> None:
        """Raise InvalidArgument if the user's ``out`` did not fit; all ranks are done by then."""
        if self.out is not None and self.x.data_ptr() != self.out.data_ptr():
            check_out_shape(self.out, tuple(self.x.shape), self.x.dtype)


def point_at_rows(target: cpu.DeliverTarget, x: torch.Tensor) -> None:
    """Have the rows written to ``x``: in place they are not."""
    target.x = address_of(x)
    target.stream = x.numel() * x.element_size() >= STREAM_BYTES


def output_shape(checked: CheckedDispatch, rows: int, num_local: int) -> OutputShape:
    """Return the sizes of the rows and their scales."""
    hidden = int(checked.rows.shape[1])
    ue8m0 = checked.scale_format == "ue8m0"
    words = 0 if checked.scale_format == "none" else num_scale_words(hidden, is_ue8m0=ue8m0)
    return OutputShape(
        layout=checked.recv_layout,
        rows=rows,
        num_blocks=num_local if checked.recv_layout is RecvLayout.EXPERT_PADDED else 1,
        hidden=hidden,
        scale_words=words,
        scale_dtype=torch.int32 if ue8m0 else torch.float32,
    )


def dispatch_output(
    tensors: DispatchTensors, handle: Handle, request: DispatchRequest
) -> DispatchOutput:
    """Return what the user gets."""
    rest = tensors.rest
    return DispatchOutput(
        x=tensors.x,
        scales=tensors.scales,
        topk_idx=rest.topk_idx,
        topk_weights=rest.topk_weights,
        num_tokens_per_expert=rest.counts,
        expert_offsets=rest.offsets,
        num_recv_tokens=rest.num_recv_tokens,
        overflow=rest.overflow,
        handle=handle,
        event=CompletedEvent() if request.async_op else None,
    )


def combine_args(
    request: CombineRequest, checked: CheckedCombine, output: CombineOutput
) -> cpu.CombineArgs:
    """Return the native arguments; they hold addresses of tensors in all three."""
    args = cpu.CombineArgs()
    fill_combine_args(args, request, checked, output)
    return args


def fill_combine_args(
    args: cpu.CombineArgs,
    request: CombineRequest,
    checked: CheckedCombine,
    output: CombineOutput,
) -> None:
    """Fill native arguments that another struct contains."""
    rows = checked.rows
    record = request.handle.records.native
    args.record = record
    args.format = row_format(rows.dtype, "none", rows.shape[1])
    outputs, target = args.outputs, args.target
    outputs.y = address_of(rows)
    outputs.row_stride = rows.stride(0) * rows.element_size()
    args.apply_weights = checked.apply_weights
    if checked.apply_weights and checked.source_weights is None:
        outputs.apply_weights = record.recv_weights_address or 1
    if checked.carried is not None:
        outputs.topk_weights = address_of(checked.carried)
    target.out = address_of(output.x)
    if checked.bias is not None:
        target.bias = address_of(checked.bias)
        target.bias_stride = checked.bias.stride(0) * checked.bias.element_size()
    if output.topk_weights is not None:
        target.topk_weights = address_of(output.topk_weights)
