# SPDX-License-Identifier: Apache-2.0
"""Rows, scales and biases between the shapes of the facades and those of deepcomm."""

from __future__ import annotations

from typing import TypeAlias

import torch

from deepcomm.errors import InvalidArgument
from deepcomm.fp8 import quantize_fp8, unpack_ue8m0
from deepcomm.types import DispatchOutput, ScaledTensor

__all__ = ["Rows", "as_rows", "bias_of", "received_rows", "round_to_powers", "row_tensor"]

Rows: TypeAlias = "torch.Tensor | tuple[torch.Tensor, torch.Tensor]"
"""Rows, or FP8 rows with their scales."""

SCALE_ROW_ALIGN_BYTES = 16
"""Column-major scales start every column at a multiple of this, as TMA wants it."""


def row_tensor(x: Rows) -> torch.Tensor:
    """Return the rows alone."""
    return x[0] if isinstance(x, tuple) else x


def as_rows(x: Rows) -> torch.Tensor | ScaledTensor:
    """Return ``x`` as a deepcomm operation takes it."""
    if not isinstance(x, tuple):
        return x
    if len(x) != 2:
        raise InvalidArgument(f"x: expected rows, or rows with scales, got {len(x)} tensors")
    return ScaledTensor(*x)


def received_rows(output: DispatchOutput, *, column_major: bool | None = None) -> Rows:
    """Return what a dispatch delivered; scales as they are, or in the order asked for."""
    if output.scales is None:
        return output.x
    if column_major is None:
        return output.x, output.scales
    ordered = _columns(output.scales) if column_major else output.scales.contiguous()
    return output.x, ordered


def _columns(scales: torch.Tensor) -> torch.Tensor:
    """Return scales [N, S] column-major, every column aligned."""
    num_rows, width = scales.shape
    align = SCALE_ROW_ALIGN_BYTES // scales.element_size()
    stride = -(-num_rows // align) * align
    if scales.stride() == (1, stride):
        return scales
    storage = scales.new_zeros(width, stride)
    return storage[:, :num_rows].t().copy_(scales)


def round_to_powers(x: torch.Tensor) -> ScaledTensor:
    """Cast rows to FP8 with scales that are powers of two, but stored as float32."""
    scaled = quantize_fp8(x, "ue8m0")
    num_tiles = -(-x.shape[-1] // 128)
    return ScaledTensor(scaled.data, unpack_ue8m0(scaled.scales, num_tiles))


def bias_of(
    bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor | None:
    """Return one bias; two are added in FP32 and rounded once."""
    if not isinstance(bias, tuple):
        return bias
    first, second = bias
    return (first.float() + second.float()).to(first.dtype)
