# SPDX-License-Identifier: Apache-2.0
"""The FP8 cast writes further copies of a row: the same bytes, and none beside them."""

from __future__ import annotations

import pytest
import torch

from deepcomm._C import simd

LINE = 64
GUARD = 0xEE
NUM_ROWS = 5


def rows_of(tensor: torch.Tensor) -> simd.Rows:
    return simd.Rows(tensor.data_ptr(), tensor.stride(0) * tensor.element_size())


def guarded_rows(hidden: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return guard bytes, and rows of whole lines amid them, which begin at a line."""
    stride = -(-hidden // LINE) * LINE
    whole = torch.full(((NUM_ROWS + 2) * stride + LINE,), GUARD, dtype=torch.uint8)
    start = stride + -(whole.data_ptr() + stride) % LINE
    return whole, whole[start : start + NUM_ROWS * stride].view(NUM_ROWS, stride)


def cast(
    isa: simd.Isa, x: torch.Tensor, ue8m0: bool, copies: list[simd.Rows]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes and their scales."""
    data = torch.empty(x.shape, dtype=torch.uint8)
    tiles = -(-x.shape[1] // 128)
    scales = torch.zeros(NUM_ROWS, tiles, dtype=torch.uint8 if ue8m0 else torch.float32)
    simd.cast_rows(
        isa,
        rows_of(data),
        rows_of(scales),
        rows_of(x),
        dtype=0,
        num_rows=NUM_ROWS,
        num_elements=x.shape[1],
        ue8m0=ue8m0,
        copies=copies,
    )
    return data, scales


@pytest.mark.parametrize("isa", simd.supported_isas(), ids=simd.isa_name)
@pytest.mark.parametrize("ue8m0", [False, True], ids=["fp32", "ue8m0"])
@pytest.mark.parametrize("hidden", [16, 128, 200, 7168])
@pytest.mark.parametrize("num_copies", [1, 3])
def test_cast_writes_copies(isa: simd.Isa, ue8m0: bool, hidden: int, num_copies: int) -> None:
    torch.manual_seed(hidden)
    x = torch.randn(NUM_ROWS, hidden).bfloat16()
    x[2, -1] = torch.inf
    buffers = [guarded_rows(hidden) for _ in range(num_copies)]
    data, scales = cast(isa, x, ue8m0, [rows_of(rows) for _, rows in buffers])
    want_data, want_scales = cast(isa, x, ue8m0, [])
    assert torch.equal(data, want_data)
    assert torch.equal(scales.view(torch.uint8), want_scales.view(torch.uint8))
    for whole, rows in buffers:
        assert torch.equal(rows[:, :hidden], want_data)
        rows[:, :hidden] = GUARD
        assert bool((whole == GUARD).all()), "wrote beside the rows"
