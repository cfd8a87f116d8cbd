# SPDX-License-Identifier: Apache-2.0
"""Memory for results that are no views: from the endpoint's pool where they are large.

Memory that is fresh from the system costs a page fault every 4 KiB, more than the rows that are
written to it; so a large result takes what an earlier one, gone by now, has left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from deepcomm.event import CompletedEvent
from deepcomm.types import CombineOutput, RecvLayout

if TYPE_CHECKING:
    from deepcomm._C import cpu
    from deepcomm.backends.base import CombineRequest
    from deepcomm.checks import CheckedCombine

__all__ = ["OutputShape", "allocate_result", "allocate_rows", "allocate_scales", "combine_output"]

POOLED_BYTES = 128 << 10
"""From this size on the allocator of C, too, asks the system."""

SCALE_ALIGN = 4


@dataclass(slots=True, kw_only=True)
class OutputShape:
    """Sizes of a dispatch's rows and their scales.

    Attributes:
        rows: Rows of ``x``, all blocks together.
        num_blocks: Blocks of ``EXPERT_PADDED``, else 1.
    """

    layout: RecvLayout
    rows: int
    num_blocks: int
    hidden: int
    scale_words: int
    scale_dtype: torch.dtype

    @property
    def x(self) -> tuple[int, ...]:
        """Shape of ``x``."""
        if self.layout is RecvLayout.EXPERT_PADDED:
            return (self.num_blocks, self.rows // self.num_blocks, self.hidden)
        return (self.rows, self.hidden)


def allocate_result(
    endpoint: cpu.Endpoint, size: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """Return an uninitialised tensor, whose memory goes back when the last reference to it does."""
    num_bytes = math.prod(size) * dtype.itemsize
    if num_bytes < POOLED_BYTES:
        return torch.empty(size, dtype=dtype)
    return endpoint.take_result(num_bytes).view(dtype).view(size)


def allocate_rows(
    endpoint: cpu.Endpoint, out: torch.Tensor | None, shape: OutputShape, dtype: torch.dtype
) -> torch.Tensor:
    """Return ``out``, cut to the rows, if it fits, else a fresh tensor."""
    size = shape.x
    if out is None or out.dtype != dtype or len(out.shape) != len(size):
        return allocate_result(endpoint, size, dtype)
    if out.shape == size:
        return out
    if len(size) == 2 and out.shape[0] >= shape.rows:
        return out[: shape.rows]
    return allocate_result(endpoint, size, dtype)


def allocate_scales(endpoint: cpu.Endpoint, shape: OutputShape, zero: bool) -> torch.Tensor | None:
    """Return the scale tensor of the layout: row-major for TOKEN, else column-major in blocks."""
    if shape.scale_words == 0:
        return None
    words, block = shape.scale_words, shape.rows // shape.num_blocks
    token = shape.layout is RecvLayout.TOKEN
    stride = block if token else -(-block // SCALE_ALIGN) * SCALE_ALIGN
    storage = allocate_result(endpoint, (shape.num_blocks * words * stride,), shape.scale_dtype)
    if zero:
        storage.zero_()
    if token:
        return storage.view(block, words)
    if shape.layout is RecvLayout.EXPERT:
        return storage.as_strided((block, words), (1, stride))
    return storage.as_strided((shape.num_blocks, block, words), (words * stride, 1, stride))


def combine_output(
    endpoint: cpu.Endpoint, request: CombineRequest, checked: CheckedCombine
) -> CombineOutput:
    """Allocate the outputs of a combine."""
    handle = request.handle
    x = request.out
    if x is None:
        x = allocate_result(
            endpoint, (handle.num_tokens, checked.rows.shape[-1]), checked.rows.dtype
        )
    weights: torch.Tensor | None = None
    if checked.carried is not None:
        weights = torch.empty(handle.num_tokens, handle.topk_idx.shape[1])
    return CombineOutput(x, weights, CompletedEvent() if request.async_op else None)
