# SPDX-License-Identifier: Apache-2.0
"""The FP8 cast against bytes worked out by hand and against an independent one in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deepcomm.errors import InvalidArgument
from deepcomm.fp8 import dequantize_fp8, quantize_fp8
from deepcomm.types import ScaledTensor


def data_bytes(x: ScaledTensor) -> list[int]:
    return x.data.view(torch.uint8).flatten().tolist()


def scale_words(x: ScaledTensor) -> list[int]:
    return x.scales.contiguous().view(torch.int32).flatten().tolist()


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values])


def test_quantize_unit_scale_bytes() -> None:
    """An amax of 448 makes scale and inverse 1, so the bytes are those of the E4M3 table."""
    cases = {
        448.0: 0x7E,
        1.0: 0x38,
        0.5: 0x30,
        -2.0: 0xC0,
        -0.0: 0x80,
        1.0625: 0x38,  # halfway 1.0 (even) and 1.125
        1.1875: 0x3A,  # halfway 1.125 and 1.25 (even)
        2.0**-9: 0x01,  # smallest subnormal
        2.0**-10: 0x00,  # halfway zero (even) and the smallest
        3 * 2.0**-10: 0x02,  # halfway the smallest and its double (even)
    }
    q = quantize_fp8(row(*cases))
    assert data_bytes(q) == list(cases.values())
    assert q.scales.tolist() == [[1.0]]


@pytest.mark.parametrize(
    ("amax", "value", "byte"),
    [
        # 2.4375 * 448 / 13 = 84 exactly, halfway 80 = 0x6A (even) and 88 = 0x6B; the rounded
        # inverse gives 84.0000076, the rounded scale would give 84.0.
        (13.0, 2.4375, 0x6B),
        # Likewise 84, the other way round: inverse 84.0, scale 84.0000076.
        (31.0, 5.8125, 0x6A),
        # Exactly 42, halfway 40 = 0x62 (even) and 44 = 0x63; 448 times the rounded 1 / 3 is more.
        (3.0, 0.28125, 0x62),
        # Likewise 42; the inverse of the rounded scale gives more.
        (19.0, 1.78125, 0x62),
    ],
)
def test_quantize_multiplies_by_the_inverse(amax: float, value: float, byte: int) -> None:
    q = quantize_fp8(row(amax, value))
    assert data_bytes(q) == [0x7E, byte]
    assert q.scales.item() == np.float32(amax) / np.float32(448)


def test_quantize_tiles_have_own_scales_and_the_last_is_short() -> None:
    x = torch.ones(2, 144, dtype=torch.bfloat16)
    x[0, 130] = 4.0
    x[1, :128] = 2.0
    q = quantize_fp8(x)
    assert q.data.shape == (2, 144)
    assert (q.scales * 448).tolist() == [[1.0, 4.0], [2.0, 1.0]]
    # Bytes: 1 / amax * 448 is 448, 112 and 224 for amax 1, 4 and 2.
    assert q.data[0, [0, 128, 130]].float().tolist() == [448.0, 112.0, 448.0]
    assert q.data[1, [0, 128]].float().tolist() == [448.0, 448.0]


def test_quantize_zero_tile_takes_the_floor() -> None:
    q = quantize_fp8(row(0.0, -0.0))
    assert data_bytes(q) == [0x00, 0x80]
    assert scale_words(q) == [0x346FACAD]  # float32(1e-4) / 448 = 2.2321429e-07


def test_quantize_divides_for_the_scale() -> None:
    """3 / 448 rounds to 0x3bdb6db7; 3 times the rounded 1 / 448 is one unit more."""
    assert scale_words(quantize_fp8(row(3.0))) == [0x3BDB6DB7]


def test_quantize_below_the_floor_is_not_stretched() -> None:
    q = quantize_fp8(row(5e-5))
    assert q.data.float().item() == 224.0


def test_quantize_nan_poisons_its_tile_alone() -> None:
    x = torch.ones(1, 256)
    x[0, 3] = torch.nan
    q = quantize_fp8(x)
    assert q.data[0, :128].float().isnan().all()
    assert q.scales[0].isnan().tolist() == [True, False]
    assert (q.data[0, 128:].float() == 448).all()


def test_quantize_infinity_dequantizes_to_nan() -> None:
    q = quantize_fp8(row(torch.inf, 1.0))
    assert q.scales.item() == torch.inf
    assert q.data[0, 0].float().isnan()
    assert q.data[0, 1].float() == 0
    assert dequantize_fp8(q).isnan().all()


def ue8m0_row(*tile_amaxes: float) -> torch.Tensor:
    x = torch.zeros(1, len(tile_amaxes), 128)
    x[0, :, 0] = torch.tensor(tile_amaxes)
    return x.flatten(1)


def test_ue8m0_bytes_and_packing() -> None:
    """Ratios amax / 448 of 1, 2, 0.67, 2.2e-7 and 2^-8: powers 0, 1, 0, -22, -8, biased by 127."""
    q = quantize_fp8(ue8m0_row(448.0, 896.0, 300.0, 0.0, 1.75), "ue8m0")
    assert q.scales.dtype == torch.int32
    assert scale_words(q) == [127 | 128 << 8 | 127 << 16 | 105 << 24, 119]
    firsts = q.data[0, ::128].float().tolist()
    assert firsts == [448.0, 448.0, 288.0, 0.0, 448.0]  # 300 lies between 288 and 320


def test_ue8m0_rounds_up_above_a_power_of_two() -> None:
    q = quantize_fp8(ue8m0_row(449.0), "ue8m0")
    assert scale_words(q) == [128]
    assert q.data[0, 0].float() == 224.0  # e4m3(449 / 2)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_ue8m0_non_finite_tile_is_all_nan(bad: float) -> None:
    q = quantize_fp8(ue8m0_row(bad, 1.0), "ue8m0")
    assert scale_words(q)[0] & 0xFF == 0xFF
    assert q.data[0, :128].float().isnan().all()
    assert dequantize_fp8(q)[0, :128].isnan().all()
    assert dequantize_fp8(q)[0, 128] == 1.0


def test_quantize_rejects_unknown_scale_format() -> None:
    with pytest.raises(InvalidArgument, match="expected fp32 or ue8m0, got e5m2"):
        quantize_fp8(row(1.0), "e5m2")


def test_quantize_no_rows() -> None:
    for scale_format, width in (("fp32", 2), ("ue8m0", 1)):
        q = quantize_fp8(torch.zeros(0, 200), scale_format)
        assert (q.data.shape, q.scales.shape) == ((0, 200), (0, width))
        assert dequantize_fp8(q).shape == (0, 200)


def e4m3_values() -> np.ndarray:
    """The 127 finite non-negative values, by code: sign 1, exponent 4 (bias 7), mantissa 3."""
    codes = np.arange(0x7F)
    exponent, mantissa = codes >> 3, codes & 7
    normal = (8 + mantissa) * 2.0 ** (exponent - 10)
    return np.where(exponent > 0, normal, mantissa * 2.0**-9)


def nearest_code(magnitude: float) -> int:
    """Code of the nearest value, the even one of two; saturates."""
    distance = np.abs(e4m3_values() - magnitude)
    best = np.flatnonzero(distance == distance.min())
    return int(best[0] if len(best) == 1 or best[0] % 2 == 0 else best[1])


def test_quantize_matches_numpy() -> None:
    """IEEE divisions in numpy, a table search for the cast: nothing shared with the reference."""
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((40, 128)) * 2.0 ** rng.integers(-12, 12, (40, 1))).astype(np.float32)
    q = quantize_fp8(torch.from_numpy(x))
    for x_row, bytes_row, scale in zip(
        x, q.data.view(torch.uint8).numpy(), q.scales[:, 0].numpy(), strict=True
    ):
        amax = max(np.abs(x_row).max(), np.float32(1e-4))
        assert scale == amax / np.float32(448)
        scaled = x_row * (np.float32(448) / amax)
        want = [nearest_code(abs(float(v))) | 0x80 * bool(np.signbit(v)) for v in scaled]
        assert bytes_row.tolist() == want


@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
def test_dequantize_is_close_and_ignores_strides(scale_format: str) -> None:
    x = torch.randn(5, 600, generator=torch.Generator().manual_seed(0))
    q = quantize_fp8(x, scale_format)
    # 3 mantissa bits: half a unit is 1/16 of the value; tiny ones lose to the subnormal spacing.
    bound = x.abs() / 16 + x.abs().max() / 448 * 2 * 2.0**-10
    assert ((dequantize_fp8(q) - x).abs() <= bound).all()
    column_major = ScaledTensor(q.data, q.scales.t().contiguous().t())
    assert torch.equal(dequantize_fp8(column_major), dequantize_fp8(q))


def test_dequantize_takes_one_column_major_word_a_row() -> None:
    x = torch.randn(6, 256, generator=torch.Generator().manual_seed(3))
    scaled = quantize_fp8(x, "ue8m0")
    column = scaled.scales.new_empty(1, 8)[:, :6].t().copy_(scaled.scales)
    assert column.stride() == (1, 8)
    assert torch.equal(dequantize_fp8(ScaledTensor(scaled.data, column)), dequantize_fp8(scaled))
