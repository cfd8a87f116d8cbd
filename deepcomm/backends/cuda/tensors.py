# SPDX-License-Identifier: Apache-2.0
"""Tensors of the CUDA operations: aligned as kernels take them, allocated or viewed results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.utils.dlpack import from_dlpack

from deepcomm.errors import InvalidArgument
from deepcomm.fp8 import num_scale_words
from deepcomm.types import RecvLayout

if TYPE_CHECKING:
    from deepcomm._C import kernels
    from deepcomm.backends.base import DispatchRequest
    from deepcomm.backends.cuda.carried_rows import CarriedRows
    from deepcomm.backends.cuda.exchange import Exchange
    from deepcomm.checks import CheckedDispatch
    from deepcomm.types import Handle

__all__ = [
    "Counted",
    "CudaRecord",
    "Forwarded",
    "Outputs",
    "address_of",
    "aligned_rows",
    "expert_outputs",
    "lease_landing",
    "row_format",
    "token_views",
]

ROW_ALIGN = 16
SCALE_ROW_ALIGN = 4


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class CudaRecord:
    """What a ``Handle`` keeps for the CUDA backend.

    Attributes:
        buffer_id: Of the buffer, alike on its ranks: its slots mean nothing to another.
        serial: Number of the operation that made the routing, alike on all ranks.
        num_origins: Of the plan.
        id_dtype: Of ``topk_idx`` as the user gave it.
        topk_idx: int32 [T, K].
        token_slot: int32 [T, K] (csrc/kernels/dispatch/params.hpp, RoutingTable).
        pair_slot: Likewise; None for ``TOKEN``.
        plan: int32 words of layout::PlanLayout.
        row_slots: int32 [rows in TOKEN order, K]; expert layouts.
        row_weights: float32, likewise, if weights were given.
        rows: What a network carries between this rank and its rail; None where there is none.
        counts: num_tokens_per_expert, offsets, num_recv_tokens and overflow of the first dispatch,
            int32 [2 L + 3].
    """

    buffer_id: bytes
    serial: int
    num_origins: int
    id_dtype: torch.dtype
    topk_idx: torch.Tensor
    token_slot: torch.Tensor
    pair_slot: torch.Tensor | None
    plan: torch.Tensor
    row_slots: torch.Tensor | None
    row_weights: torch.Tensor | None
    counts: torch.Tensor
    rows: CarriedRows | None = None

    @property
    def tensors(self) -> list[torch.Tensor | None]:
        """Everything that kernels read or write of it; the tables share one storage."""
        return [self.topk_idx, self.plan, self.counts, self.row_slots, self.row_weights]


@dataclass(frozen=True, slots=True)
class Counted:
    """Rows that arrive, as the host knows them.

    Attributes:
        num_rows: Rows of ``x``, padding included.
        num_tokens: Rows in TOKEN order, or the most there can be.
    """

    num_rows: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class RowFormat:
    """How rows travel and arrive.

    Attributes:
        wire: Key of ``functions.WIRES``.
        dtype: Of the rows that arrive.
        scale_words: 32-bit words of scales a row.
        scale_dtype: Of the scales.
        scales: 0 none, 1 FP32, 2 UE8M0.
    """

    wire: str
    dtype: torch.dtype
    scale_words: int
    scale_dtype: torch.dtype
    scales: int


def row_format(checked: CheckedDispatch) -> RowFormat:
    """Return how the rows of a dispatch travel."""
    if checked.scale_format == "none":
        return RowFormat("bf16", checked.rows.dtype, 0, torch.float32, 0)
    ue8m0 = checked.scale_format == "ue8m0"
    return RowFormat(
        wire="cast" if checked.quantize else "fp8",
        dtype=torch.float8_e4m3fn,
        scale_words=num_scale_words(int(checked.rows.shape[1]), is_ue8m0=ue8m0),
        scale_dtype=torch.int32 if ue8m0 else torch.float32,
        scales=2 if ue8m0 else 1,
    )


def address_of(tensor: torch.Tensor | None) -> int:
    """Return a tensor's address; 0 for None, and never 0 for an empty tensor."""
    return 0 if tensor is None else tensor.data_ptr() or 1


def aligned_rows(rows: torch.Tensor) -> torch.Tensor:
    """Return rows [n, H] that begin at multiples of 16 bytes, copied only if need be."""
    stride = rows.stride(0) * rows.element_size() if len(rows) > 1 else 0
    if rows.data_ptr() % ROW_ALIGN == 0 and stride % ROW_ALIGN == 0:
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True, slots=True, eq=False)
class Outputs:
    """Tensors of one dispatch that depend on the layout."""

    x: torch.Tensor
    scales: torch.Tensor | None
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Forwarded:
    """What a rail brings to a rank that sends it on to its node.

    Attributes:
        rows: Views of room for the tokens of all ranks of the rail; the first ones are used.
        handle: Of the dispatch on the rail.
        tokens_from: Address of each origin's first token, and of how many tokens there are.
    """

    rows: Outputs
    handle: Handle
    tokens_from: int


def lease_landing(exchange: Exchange, generation: int) -> torch.Tensor:
    """Return the bytes of a landing area; it is leased for as long as their storage lives."""
    areas = exchange.layout.areas
    begin, end = areas.generation(generation), areas.generation(generation + 1)
    return from_dlpack(exchange.memory.lease(generation, begin, end - begin))


def token_views(
    whole: torch.Tensor,
    offsets: kernels.LandingOffsets,
    checked: CheckedDispatch,
    fmt: RowFormat,
    num_rows: int,
) -> Outputs:
    """Return views of the first rows of a landing area, of which ``whole`` are the bytes."""
    hidden, num_topk = int(checked.rows.shape[1]), checked.num_topk

    def view(offset: int, dtype: torch.dtype, width: int) -> torch.Tensor:
        size = num_rows * width * dtype.itemsize
        return whole[offset : offset + size].view(dtype).view(num_rows, width)

    return Outputs(
        x=view(offsets.rows, fmt.dtype, hidden),
        scales=view(offsets.scales, fmt.scale_dtype, fmt.scale_words) if fmt.scale_words else None,
        topk_idx=view(offsets.topk_idx, checked.id_dtype, num_topk),
        topk_weights=view(offsets.topk_weights, torch.float32, num_topk)
        if checked.topk_weights is not None
        else None,
    )


def owned_copy(views: Outputs, num_rows: int, out: torch.Tensor | None) -> Outputs:
    """Copy views into tensors of ``num_rows`` rows or more; ``x`` into ``out`` if given."""
    present = views.x.shape[0]

    def grown(tensor: torch.Tensor, target: torch.Tensor | None, fill: float) -> torch.Tensor:
        if target is None:
            target = tensor.new_empty(num_rows, *tensor.shape[1:])
        bits = target.view(torch.uint8) if target.dtype.itemsize == 1 else target
        source = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
        bits[:present].copy_(source)
        if present < num_rows:
            bits[present:].fill_(fill)
        return target

    if out is not None:
        out = fitting_out(out, num_rows, views.x)
    return Outputs(
        x=grown(views.x, out, 0),
        scales=None if views.scales is None else grown(views.scales, None, 0),
        topk_idx=None if views.topk_idx is None else grown(views.topk_idx, None, -1),
        topk_weights=None if views.topk_weights is None else grown(views.topk_weights, None, 0),
    )


def fitting_out(out: torch.Tensor, num_rows: int, like: torch.Tensor) -> torch.Tensor | None:
    """Return ``out`` cut to the rows, or None where it does not fit."""
    if out.dtype != like.dtype or out.ndim != like.ndim or out.shape[1:] != like.shape[1:]:
        return None
    return out[:num_rows] if len(out) >= num_rows else None


def expert_outputs(
    request: DispatchRequest, checked: CheckedDispatch, fmt: RowFormat, blocks: tuple[int, int]
) -> Outputs:
    """Allocate for an expert layout of (blocks, rows of each)."""
    num_blocks, block_rows = blocks
    hidden, device = int(checked.rows.shape[1]), checked.rows.device
    is_padded = checked.recv_layout is RecvLayout.EXPERT_PADDED
    lead = blocks if is_padded else (block_rows,)
    make = torch.zeros if request.zero_padding else torch.empty
    x: torch.Tensor | None = None
    if request.out is not None and request.out.dtype == fmt.dtype:
        if tuple(request.out.shape) == (*lead, hidden):
            x = request.out
        elif not is_padded and request.out.ndim == 2 and len(request.out) >= block_rows:
            x = request.out[:block_rows]
    if x is None:
        x = make(*lead, hidden, dtype=fmt.dtype, device=device)
    elif request.zero_padding:
        x.view(torch.uint8).zero_()
    scales: torch.Tensor | None = None
    if fmt.scale_words:
        stride = -(-block_rows // SCALE_ROW_ALIGN) * SCALE_ROW_ALIGN
        words = fmt.scale_words
        storage = make(num_blocks * words * stride, dtype=fmt.scale_dtype, device=device)
        if is_padded:
            shape = (num_blocks, block_rows, words)
            scales = storage.as_strided(shape, (words * stride, 1, stride))
        else:
            scales = storage.as_strided((block_rows, words), (1, stride))
    weights: torch.Tensor | None = None
    if checked.topk_weights is not None:
        weights = torch.zeros(lead, dtype=torch.float32, device=device)
    return Outputs(x=x, scales=scales, topk_idx=None, topk_weights=weights)


def record_of(handle: Handle, buffer_id: bytes) -> CudaRecord:
    """Return a handle's record, if it is one of the buffer's.

    Raises:
        InvalidArgument: The handle comes from another buffer.
    """
    record = handle.records
    if not isinstance(record, CudaRecord) or record.buffer_id != buffer_id:
        raise InvalidArgument("handle: expected one of this buffer, got one of another")
    return record
