# SPDX-License-Identifier: Apache-2.0
"""Tensors of the low-latency operations on GPUs: what comes out, and what a handle keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from deepcomm._C import kernels
from deepcomm.checks import check_out_shape
from deepcomm.errors import InvalidArgument
from deepcomm.types import SCALE_TILE, Handle, RecvLayout

if TYPE_CHECKING:
    from deepcomm.backends.base import DispatchRequest
    from deepcomm.checks import CheckedDispatch

__all__ = ["DispatchTensors", "Record", "Sizes", "address_of", "aligned", "row_kind", "wire_of"]

ALIGN = 16
SCALE_ROW_ALIGN = 4

KINDS = BF16, FP8_FP32, FP8_UE8M0, CAST_FP32, CAST_UE8M0 = tuple(range(5))
"""Rows of a dispatch: ``LowLatencyRows`` of csrc/kernels/low_latency/params.hpp."""


def row_kind(checked: CheckedDispatch) -> int:
    """Return the kind of rows, which the kernel is compiled for."""
    if checked.scale_format == "none":
        return BF16
    given = FP8_FP32 if checked.scale_format == "fp32" else FP8_UE8M0
    return given + (CAST_FP32 - FP8_FP32) * checked.quantize


def wire_of(kind: int) -> int:
    """Return the kind as which such rows travel and are received."""
    return {CAST_FP32: FP8_FP32, CAST_UE8M0: FP8_UE8M0}.get(kind, kind)


def address_of(tensor: torch.Tensor | None) -> int:
    """Return a tensor's address; 0 for None, and never 0 for an empty tensor."""
    return 0 if tensor is None else tensor.data_ptr() or 1


def aligned(rows: torch.Tensor) -> torch.Tensor:
    """Return rows that begin at multiples of 16 bytes, copied only if need be."""
    stride = rows.stride(0) * rows.element_size() if len(rows) > 1 else 0
    if rows.data_ptr() % ALIGN == 0 and stride % ALIGN == 0:
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


@dataclass(slots=True, eq=False)
class Record:
    """What a ``Handle`` keeps.

    Attributes:
        buffer_id: Of the buffer, alike on its ranks: its slots mean nothing to another.
        words: int32, ``LowLatencyRecordLayout``.
        map: Where what is in them.
        is_complete: Whether the receive phase has been launched.
    """

    buffer_id: bytes
    words: torch.Tensor
    map: kernels.LowLatencyRecordLayout
    is_complete: bool = False

    @staticmethod
    def make(buffer_id: bytes, shape: tuple[int, int, int], device: torch.device) -> Record:
        """Allocate for (ranks, tokens of a rank, K)."""
        record_map = kernels.LowLatencyRecordLayout.make(*shape)
        words = torch.empty(record_map.num_words, dtype=torch.int32, device=device)
        return Record(buffer_id, words, record_map)

    def fill(self, base: kernels.LowLatencyParams) -> None:
        """Tell a kernel where it is."""
        base.record = self.words.data_ptr()
        base.record_map = self.map

    @staticmethod
    def of(handle: Handle, buffer_id: bytes) -> Record:
        """Return a handle's record.

        Raises:
            InvalidArgument: The handle comes from another buffer, or its hook was not called.
        """
        record = handle.records
        if not isinstance(record, Record) or record.buffer_id != buffer_id:
            raise InvalidArgument("handle: expected one of this buffer, got one of another")
        if not record.is_complete:
            raise InvalidArgument("handle: expected the hook of its dispatch to have been called")
        return record


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a buffer's outputs: L blocks of M rows of H elements."""

    num_local_experts: int
    block_rows: int
    hidden: int
    device: torch.device


@dataclass(frozen=True, slots=True, eq=False)
class DispatchTensors:
    """What a dispatch fills.

    Attributes:
        ints: int32 [L + 1]: the counts, and the number of rows received.
        topk_idx_copy: int32 [T, K], for the handle.
        topk_weights_copy: float32 [T, K], or None.
    """

    x: torch.Tensor
    scales: torch.Tensor | None
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    ints: torch.Tensor
    topk_idx_copy: torch.Tensor
    topk_weights_copy: torch.Tensor | None

    @staticmethod
    def allocate(
        request: DispatchRequest, checked: CheckedDispatch, sizes: Sizes
    ) -> DispatchTensors:
        """Allocate; what holds no token is filled by the kernels, but for rows."""
        assert checked.topk_idx is not None
        is_token = checked.recv_layout is RecvLayout.TOKEN
        lead = (sizes.block_rows,) if is_token else (sizes.num_local_experts, sizes.block_rows)
        of_tokens = (sizes.block_rows, checked.num_topk)
        device, weights = sizes.device, checked.topk_weights
        return DispatchTensors(
            x=_allocate_rows(request, checked, (*lead, sizes.hidden), device),
            scales=_allocate_scales(request, checked, lead, sizes),
            topk_idx=torch.empty(of_tokens, dtype=checked.id_dtype, device=device)
            if is_token
            else None,
            topk_weights=None
            if weights is None
            else torch.empty(of_tokens if is_token else lead, device=device),
            ints=torch.empty(sizes.num_local_experts + 1, dtype=torch.int32, device=device),
            topk_idx_copy=torch.empty(checked.topk_idx.shape, dtype=torch.int32, device=device),
            topk_weights_copy=None if weights is None else torch.empty_like(weights),
        )

    def fill(self, params: Any) -> None:
        """Tell the kernel where they are."""
        params.out_x = address_of(self.x)
        params.out_topk_idx = address_of(self.topk_idx)
        params.out_topk_weights = address_of(self.topk_weights)
        params.counts = self.ints.data_ptr()
        params.num_recv = self.ints.data_ptr() + 4 * (len(self.ints) - 1)
        params.handle_topk_idx = address_of(self.topk_idx_copy)
        params.handle_topk_weights = address_of(self.topk_weights_copy)
        params.out_scales = address_of(self.scales)
        if self.scales is not None:
            block, row, word = (0, *self.scales.stride())[-3:]
            params.scale_block_stride = block
            params.scale_row_stride = row
            params.scale_word_stride = word


def _allocate_rows(
    request: DispatchRequest,
    checked: CheckedDispatch,
    shape: tuple[int, ...],
    device: torch.device,
) -> torch.Tensor:
    dtype = torch.bfloat16 if checked.scale_format == "none" else torch.float8_e4m3fn
    if request.out is None:
        make = torch.zeros if request.zero_padding else torch.empty
        return make(shape, dtype=dtype, device=device)
    check_out_shape(request.out, shape, dtype)
    out = request.out if tuple(request.out.shape) == shape else request.out[: shape[0]]
    if out.data_ptr() % ALIGN:
        raise InvalidArgument(f"out: expected it to begin at a multiple of {ALIGN} bytes")
    if request.zero_padding:
        out.view(torch.uint8).zero_()
    return out


def _allocate_scales(
    request: DispatchRequest, checked: CheckedDispatch, lead: tuple[int, ...], sizes: Sizes
) -> torch.Tensor | None:
    if checked.scale_format == "none":
        return None
    tiles = -(-sizes.hidden // SCALE_TILE)
    is_ue8m0 = checked.scale_format == "ue8m0"
    words = -(-tiles // 4) if is_ue8m0 else tiles
    dtype = torch.int32 if is_ue8m0 else torch.float32
    make = torch.zeros if request.zero_padding else torch.empty
    if len(lead) == 1:
        return make(*lead, words, dtype=dtype, device=sizes.device)
    num_blocks, block_rows = lead
    stride = -(-block_rows // SCALE_ROW_ALIGN) * SCALE_ROW_ALIGN
    storage = make(num_blocks * words * stride, dtype=dtype, device=sizes.device)
    return storage.as_strided((num_blocks, block_rows, words), (words * stride, 1, stride))
