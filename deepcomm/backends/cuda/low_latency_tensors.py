# SPDX-License-Identifier: Apache-2.0
"""Tensors of the low-latency operations on GPUs: how they are given, and how allocated."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

from deepcomm._C import kernels
from deepcomm.backends.cuda.low_latency_words import contiguous_strides
from deepcomm.checks import check_out_shape
from deepcomm.errors import InvalidArgument
from deepcomm.fp8 import num_scale_words
from deepcomm.types import RecvLayout

if TYPE_CHECKING:
    from collections.abc import Callable

    from deepcomm.backends.base import DispatchRequest
    from deepcomm.backends.cuda.low_latency_words import Sizes, Words
    from deepcomm.checks import CheckedDispatch

__all__ = ["Outputs", "address_of", "aligned", "empty", "row_kind", "seen_as", "wire_of"]

ALIGN = 16
SCALE_ROW_ALIGN = 4

KINDS = BF16, FP8_FP32, FP8_UE8M0, CAST_FP32, CAST_UE8M0 = tuple(range(5))
"""Rows of a dispatch: ``LowLatencyRows`` of csrc/kernels/low_latency/params.hpp."""

Allocate: TypeAlias = "Callable[[], torch.Tensor]"
Maybe: TypeAlias = "torch.Tensor | None"
AllocateAll: TypeAlias = "Callable[[], tuple[Maybe, Maybe, Maybe, torch.Tensor]]"


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


def empty(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    strides: tuple[int, ...] | None = None,
) -> Allocate:
    """Return what allocates such tensors: in half of the time that ``torch.empty`` takes.

    Or in a quarter of it, with the function of torch that its compiled code calls. That one knows
    only the current device, and fills nothing where torch is to be deterministic.
    """
    strides = contiguous_strides(shape) if strides is None else strides
    like = torch.empty(0, dtype=dtype, device=device)
    anywhere = functools.partial(like.new_empty_strided, shape, strides)
    function = _of_compiled_code(f"_empty_strided_{device.type}")
    if function is None:
        return anywhere
    current_device = None if device.type == "cpu" else torch._C._cuda_getDevice
    allocate: Allocate = kernels.allocator(
        function, (shape, strides, dtype), current_device, device.index or 0, anywhere
    )
    return allocate


def seen_as(allocate: Allocate, shape: tuple[int, ...], strides: tuple[int, ...]) -> Allocate:
    """Return what allocates likewise, and gives the beginning of it in another shape."""
    view = _of_compiled_code("_reinterpret_tensor") or torch.as_strided
    return lambda: view(allocate(), shape, strides)


def _of_compiled_code(name: str) -> Callable[..., torch.Tensor] | None:
    """Return a function of torch that its compiled code calls, as it takes so little time."""
    guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    function: Callable[..., torch.Tensor] | None = getattr(guards, name, None)
    return function


def zeroed(allocate: Allocate, zero_padding: bool) -> Allocate:
    """Return what allocates likewise, zeros if rows that hold no token are to be that."""
    return (lambda: allocate().zero_()) if zero_padding else allocate


@dataclass(frozen=True, slots=True, eq=False)
class Outputs:
    """How the outputs of dispatches alike are allocated.

    What holds no token is filled by the kernels, but for rows.

    Attributes:
        allocate: Returns rows, scales, ids and words; None for those given, or that there are not.
        scale_strides: Of block, row and word.
        map: Of the words.
        num_rows: Rows of ``out`` that are used, None for all.
    """

    allocate: AllocateAll
    scale_strides: tuple[int, int, int]
    map: Words
    num_rows: int | None
    zero_padding: bool

    @staticmethod
    def of(
        request: DispatchRequest, checked: CheckedDispatch, sizes: Sizes, words: Words
    ) -> Outputs:
        """Decide.

        Raises:
            InvalidArgument: ``out`` is wrong.
        """
        device, lead = sizes.device, words.lead
        dtype = torch.bfloat16 if checked.scale_format == "none" else torch.float8_e4m3fn
        shape = (*lead, sizes.hidden)
        if request.out is not None:
            check_out_shape(request.out, shape, dtype)
            if request.out.data_ptr() % ALIGN:
                raise InvalidArgument(f"out: expected it to begin at a multiple of {ALIGN} bytes")
        scales, scale_strides = _of_scales(request, checked, shape, device)
        x = topk_idx = None
        if request.out is None:
            x = zeroed(empty(shape, dtype, device), request.zero_padding)
        if checked.recv_layout is RecvLayout.TOKEN:
            topk_idx = empty((*lead, checked.num_topk), checked.id_dtype, device)
        record = empty((words.num_words,), torch.int32, device)
        return Outputs(
            allocate=kernels.allocator_of_all([x, scales, topk_idx, record]),
            scale_strides=scale_strides,
            map=words,
            num_rows=None if request.out is None or request.out.shape == shape else lead[0],
            zero_padding=request.zero_padding,
        )

    def rows(self, out: torch.Tensor) -> torch.Tensor:
        """Return the part of a given tensor to receive into."""
        rows = out if self.num_rows is None else out[: self.num_rows]
        if self.zero_padding:
            rows.view(torch.uint8).zero_()
        return rows


def _of_scales(
    request: DispatchRequest,
    checked: CheckedDispatch,
    shape: tuple[int, ...],
    device: torch.device,
) -> tuple[Allocate | None, tuple[int, int, int]]:
    """Decide for rows of this shape; return also the strides of block, row and word."""
    if checked.scale_format == "none":
        return None, (0, 0, 0)
    *lead, hidden = shape
    is_ue8m0 = checked.scale_format == "ue8m0"
    words = num_scale_words(hidden, is_ue8m0=is_ue8m0)
    dtype = torch.int32 if is_ue8m0 else torch.float32
    if len(lead) == 1:
        scales = zeroed(empty((*lead, words), dtype, device), request.zero_padding)
        return scales, (0, words, 1)
    num_blocks, num_rows = lead
    column = -(-num_rows // SCALE_ROW_ALIGN) * SCALE_ROW_ALIGN
    strides = (words * column, 1, column)
    columns = empty((num_blocks, column, words), dtype, device, strides)
    columns = zeroed(columns, request.zero_padding)
    if column != num_rows:
        columns = seen_as(columns, (num_blocks, num_rows, words), strides)
    return columns, strides
