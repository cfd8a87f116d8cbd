# SPDX-License-Identifier: Apache-2.0
"""The FP8 cast, to the bit, in plain torch: part of the executable specification."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from deepcomm.errors import InvalidArgument
from deepcomm.types import SCALE_TILE, ScaledTensor

__all__ = ["dequantize_fp8", "num_scale_words", "quantize_fp8", "unpack_ue8m0"]

FP8_MAX = 448.0
AMAX_FLOOR = 1e-4
UE8M0_NAN = 0xFF
TILES_PER_WORD = 4
"""Of UE8M0 scales."""


def num_scale_words(hidden: int, *, is_ue8m0: bool) -> int:
    """Return the 32-bit words of scales that a row of ``hidden`` elements has."""
    num_tiles = -(-hidden // SCALE_TILE)
    return -(-num_tiles // TILES_PER_WORD) if is_ue8m0 else num_tiles


def quantize_fp8(x: torch.Tensor, scale_format: str = "fp32") -> ScaledTensor:
    """Cast rows to FP8 E4M3 with one scale per tile of 128 channels, the last possibly shorter.

    With amax = max(|x|) of the tile, at least 1e-4, every operation rounded to FP32:

    - "fp32": scale = amax / 448, data = e4m3(x * (448 / amax));
    - "ue8m0": scale = amax / 448 rounded up to a power of two, data = e4m3(x * (1 / scale)).

    The cast to E4M3 rounds to nearest even and saturates. A NaN makes its tile NaN, data and scale.
    So does an infinity under "ue8m0"; under "fp32" it makes the scale infinite, itself NaN and the
    other elements 0, so that the tile dequantizes to NaN as well.

    Args:
        x: bfloat16, float16 or float32 [..., H].
        scale_format: "fp32" or "ue8m0".

    Returns:
        Data float8_e4m3fn [..., H] with scales float32 [..., S] or, for "ue8m0", int32
        [..., ceil(S / 4)]: four exponent bytes a word, lowest byte first, absent bytes 0.

    Raises:
        InvalidArgument: ``scale_format`` is neither.
    """
    *leading, hidden = x.shape
    num_tiles = -(-hidden // SCALE_TILE)
    x_st = pad(x.float(), (0, -hidden % SCALE_TILE)).reshape(*leading, num_tiles, SCALE_TILE)
    amax_s = x_st.abs().amax(-1).clamp(min=AMAX_FLOOR)
    # NOTE: number / tensor is reciprocal-and-multiply in torch, which rounds twice.
    fp8_max_s = torch.full_like(amax_s, FP8_MAX)
    scales_s = amax_s / fp8_max_s
    if scale_format == "fp32":
        scales, inv_s = scales_s, fp8_max_s / amax_s
    elif scale_format == "ue8m0":
        byte_s = _round_up_to_ue8m0(scales_s)
        scales, inv_s = _pack_bytes(byte_s), torch.ones_like(amax_s) / _ue8m0_value(byte_s)
    else:
        raise InvalidArgument(f"scale_format: expected fp32 or ue8m0, got {scale_format}")
    data_h = (x_st * inv_s[..., None]).flatten(-2)[..., :hidden]
    # NOTE: torch's cast does not promise to saturate; clamp keeps NaN.
    return ScaledTensor(data_h.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scales)


def dequantize_fp8(x: ScaledTensor) -> torch.Tensor:
    """Return data * scale as float32 [..., H]; takes either scale format, scales of any strides."""
    hidden = x.data.shape[-1]
    num_tiles = -(-hidden // SCALE_TILE)
    scales_s = x.scales
    if scales_s.dtype == torch.int32:
        scales_s = unpack_ue8m0(scales_s, num_tiles)
    return x.data.float() * scales_s.repeat_interleave(SCALE_TILE, -1)[..., :hidden]


def unpack_ue8m0(scales: torch.Tensor, num_tiles: int) -> torch.Tensor:
    """Return packed UE8M0 scales, int32 [..., ceil(S / 4)], as float32 [..., S]."""
    # NOTE: contiguous() keeps the stride of an axis of length 1, which view() then refuses.
    words = scales.clone(memory_format=torch.contiguous_format)
    return _ue8m0_value(words.view(torch.uint8)[..., :num_tiles])


def _round_up_to_ue8m0(scales: torch.Tensor) -> torch.Tensor:
    """Return as int32 the exponent byte of the smallest power of two >= each normal scale."""
    bits = scales.view(torch.int32)
    byte = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
    return torch.where(scales.isfinite(), byte, UE8M0_NAN)


def _ue8m0_value(byte: torch.Tensor) -> torch.Tensor:
    power = (byte.int() << 23).view(torch.float32)
    return torch.where(byte == UE8M0_NAN, torch.nan, power)


def _pack_bytes(byte_s: torch.Tensor) -> torch.Tensor:
    """Return int32 [..., ceil(S / 4)], lowest byte first."""
    padded = pad(byte_s.to(torch.uint8), (0, -byte_s.shape[-1] % 4))
    return padded.contiguous().view(torch.int32)
