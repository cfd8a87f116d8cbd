# SPDX-License-Identifier: Apache-2.0
"""Tensors of the CPU operations: native arguments from checked ones, and the outputs to fill.

What every call makes and drops is not frozen: that would make it three times as slow.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch.utils.dlpack import from_dlpack

from deepcomm._C import cpu
from deepcomm.backends.cpu_results import OutputShape, allocate_rows, allocate_scales
from deepcomm.checks import check_out_shape
from deepcomm.errors import InvalidArgument
from deepcomm.types import Handle, RecvLayout

if TYPE_CHECKING:
    from deepcomm.backends.base import CombineRequest, DispatchRequest
    from deepcomm.checks import CheckedCombine, CheckedDispatch
    from deepcomm.types import CombineOutput

__all__ = [
    "CpuRecord",
    "DispatchTensors",
    "combine_args",
    "dispatch_args",
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


def dispatch_args(checked: CheckedDispatch, hidden: int) -> cpu.DispatchArgs:
    """Return the native arguments; they hold addresses of the tensors in ``checked``."""
    args = cpu.DispatchArgs()
    rows, given = checked.rows, args.input
    given.rows = rows.data_ptr()
    given.row_stride = rows.stride(0) * rows.element_size()
    given.dtype = DTYPES[rows.dtype]
    given.quantize = checked.quantize
    if checked.scales is not None:
        given.scales = checked.scales.data_ptr()
        given.scale_stride = checked.scales.stride(0) * checked.scales.element_size()
    args.format = row_format(row_dtype(checked), checked.scale_format, hidden)
    args.num_tokens = checked.num_tokens
    args.num_topk = checked.num_topk
    if checked.topk_idx is not None:
        args.topk_idx = checked.topk_idx.data_ptr()
        args.topk_idx_is_int64 = checked.topk_idx.dtype == torch.int64
    if checked.topk_weights is not None:
        args.topk_weights = address_of(checked.topk_weights)
    args.recv_layout = LAYOUTS[checked.recv_layout]
    args.expert_alignment = checked.expert_alignment
    args.capacity = -1 if checked.capacity is None else checked.capacity
    return args


def address_of(tensor: torch.Tensor) -> int:
    """Return a tensor's address; never 0, which would mean that it was not given."""
    return tensor.data_ptr() or 1


def make_handle(
    request: DispatchRequest, checked: CheckedDispatch, num_rows: int, record: CpuRecord
) -> Handle:
    """Return the handle of a dispatch; it owns copies of what the user gave."""
    weights = None if checked.topk_weights is None else checked.topk_weights.clone()
    cached = request.handle
    if cached is not None:
        topk_idx = cached.topk_idx
        record = replace(record, id_dtype=cached.records.id_dtype)
    else:
        assert checked.topk_idx is not None
        topk_idx = checked.topk_idx.to(torch.int32, copy=True)
    return Handle(
        recv_layout=checked.recv_layout,
        expert_alignment=checked.expert_alignment,
        capacity=checked.capacity,
        num_tokens=checked.num_tokens,
        num_rows=num_rows,
        topk_idx=topk_idx,
        topk_weights=weights,
        low_latency=request.low_latency,
        records=record,
    )


@dataclass(slots=True, eq=False)
class RowTensors:
    """The rows to be received, and whether they lie in ``x`` already."""

    x: torch.Tensor
    scales: torch.Tensor | None
    in_place: bool


@dataclass(slots=True, eq=False, kw_only=True)
class DispatchTensors:
    """Output tensors of one dispatch, allocated, to be filled by the native code.

    Attributes:
        x: The rows: a view of shared memory, or owned.
        in_place: Whether the rows lie in ``x`` already.
        out: The user's tensor to check and fill, or None.
    """

    x: torch.Tensor
    in_place: bool
    out: torch.Tensor | None
    scales: torch.Tensor | None
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    counts: torch.Tensor
    offsets: torch.Tensor | None
    num_recv_tokens: torch.Tensor
    overflow: torch.Tensor
    zero_padding: bool

    @staticmethod
    def of_dispatch(
        op: cpu.DispatchOp,
        request: DispatchRequest,
        checked: CheckedDispatch,
        endpoint: cpu.Endpoint,
    ) -> DispatchTensors:
        """Allocate for a high-throughput dispatch, or view its landing area."""
        received = op.received
        shape = output_shape(
            checked, received.out_rows, len(received.counts), int(request_hidden(checked))
        )
        dtype = row_dtype(checked)
        lease = None if request.owned or request.out is not None else op.lease_rows()
        if lease is None:
            x = allocate_rows(endpoint, request.out, shape, dtype)
        else:
            x = from_dlpack(lease)
            x = x if x.dtype == dtype else x.view(dtype)
        id_dtype = checked.id_dtype
        if request.handle is not None:
            id_dtype = request.handle.records.id_dtype
        scales = allocate_scales(endpoint, shape, request.zero_padding)
        return allocate(request, checked, shape, RowTensors(x, scales, lease is not None), id_dtype)

    @staticmethod
    def of_low_latency(
        request: DispatchRequest,
        checked: CheckedDispatch,
        num_local: int,
        max_rows: int,
        endpoint: cpu.Endpoint,
    ) -> DispatchTensors:
        """Allocate for a low-latency dispatch, whose shapes are fixed."""
        token = checked.recv_layout is RecvLayout.TOKEN
        rows = max_rows if token else num_local * max_rows
        shape = output_shape(checked, rows, num_local, request_hidden(checked), fixed=True)
        dtype = row_dtype(checked)
        if request.out is not None:
            check_out_shape(request.out, shape.x, dtype)
        x = allocate_rows(endpoint, request.out, shape, dtype)
        scales = allocate_scales(endpoint, shape, request.zero_padding)
        return allocate(request, checked, shape, RowTensors(x, scales, False), checked.id_dtype)

    def target(self) -> cpu.DeliverTarget:
        """Return where the native code writes."""
        target = cpu.DeliverTarget()
        if not self.in_place:
            target.x = address_of(self.x)
            target.stream = self.x.numel() * self.x.element_size() >= STREAM_BYTES
        if self.scales is not None:
            target.scales = address_of(self.scales)
        if self.topk_idx is not None:
            target.topk_idx = address_of(self.topk_idx)
            target.topk_idx_is_int64 = self.topk_idx.dtype == torch.int64
        if self.topk_weights is not None:
            target.topk_weights = address_of(self.topk_weights)
        target.counts = address_of(self.counts)
        if self.offsets is not None:
            target.offsets = address_of(self.offsets)
        target.num_recv_tokens = self.num_recv_tokens.data_ptr()
        target.overflow = self.overflow.data_ptr()
        target.zero_padding = self.zero_padding
        return target

    def check_out(self) -> None:
        """Raise InvalidArgument if the user's ``out`` did not fit; all ranks are done by then."""
        if self.out is not None and self.x.data_ptr() != self.out.data_ptr():
            check_out_shape(self.out, tuple(self.x.shape), self.x.dtype)


def request_hidden(checked: CheckedDispatch) -> int:
    """Return H."""
    return int(checked.rows.shape[1])


def output_shape(
    checked: CheckedDispatch, rows: int, num_local: int, hidden: int, *, fixed: bool = False
) -> OutputShape:
    """Return the sizes of the outputs."""
    tiles = -(-hidden // 128)
    ue8m0 = checked.scale_format == "ue8m0"
    words = 0 if checked.scale_format == "none" else -(-tiles // 4) if ue8m0 else tiles
    padded = checked.recv_layout is RecvLayout.EXPERT_PADDED
    return OutputShape(
        layout=checked.recv_layout,
        rows=rows,
        num_blocks=num_local if padded else 1,
        num_local_experts=num_local,
        num_topk=checked.num_topk,
        hidden=hidden,
        scale_words=words,
        scale_dtype=torch.int32 if ue8m0 else torch.float32,
        partly_filled=fixed or checked.capacity is not None,
    )


def allocate(
    request: DispatchRequest,
    checked: CheckedDispatch,
    shape: OutputShape,
    rows: RowTensors,
    id_dtype: torch.dtype,
) -> DispatchTensors:
    """Allocate all outputs but the rows and their scales."""
    token = shape.layout is RecvLayout.TOKEN
    topk_idx: torch.Tensor | None = None
    topk_weights: torch.Tensor | None = None
    if token:
        size = (shape.rows, shape.num_topk)
        topk_idx = (
            torch.full(size, -1, dtype=id_dtype)
            if shape.partly_filled
            else torch.empty(size, dtype=id_dtype)
        )
    if checked.topk_weights is not None:
        topk_weights = torch.zeros(size if token else shape.x[:-1])
    offsets: torch.Tensor | None = None
    if shape.layout is RecvLayout.EXPERT:
        offsets = torch.empty(shape.num_local_experts + 1, dtype=torch.int32)
    return DispatchTensors(
        x=rows.x,
        in_place=rows.in_place,
        out=request.out,
        scales=rows.scales,
        topk_idx=topk_idx,
        topk_weights=topk_weights,
        counts=torch.empty(shape.num_local_experts, dtype=torch.int32),
        offsets=offsets,
        num_recv_tokens=torch.empty((), dtype=torch.int32),
        overflow=torch.empty((), dtype=torch.bool),
        zero_padding=request.zero_padding,
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
