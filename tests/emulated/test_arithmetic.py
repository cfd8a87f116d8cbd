# SPDX-License-Identifier: Apache-2.0
"""The device layer's arithmetic is torch's and deepcomm.fp8's, bit for bit."""

from __future__ import annotations

import ctypes
import re

import numpy as np
import pytest
import torch
from emulated.build import CSRC, build_library

from deepcomm import jit
from deepcomm.fp8 import quantize_fp8
from deepcomm.jit.sources import collect

UPPER = np.arange(1 << 16, dtype=np.uint32) << 16
# Below every upper half: nothing, ties and their neighbours for BF16, and for E4M3's fourth bit.
LOWER = np.array([0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
PATTERNS = (UPPER[:, None] | LOWER).reshape(-1)
SPECIAL = np.array(
    [
        *(0x00000000, 0x80000000, 0x00000001, 0x007FFFFF, 0x00800000, 0x38D1B717, 0x3F800000),
        *(0x3F800001, 0xBF800000, 0x43E00000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000),
    ],
    np.uint32,
)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(build_library("arithmetic")))


def call(function: object, *arguments: object) -> None:
    """Call with arrays as pointers."""
    assert callable(function)
    function(
        *(
            argument.ctypes.data_as(ctypes.c_void_p)
            if isinstance(argument, np.ndarray)
            else argument
            for argument in arguments
        )
    )


def size(array: np.ndarray) -> ctypes.c_int64:
    return ctypes.c_int64(len(array))


def as_floats(bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(bits.view(np.float32))


def assert_same(actual: np.ndarray, expected: np.ndarray, nan_above: int) -> None:
    """Compare bits; a NaN, whose magnitude is above all numbers', equals any NaN."""
    sign = np.array(1, actual.dtype) << np.array(actual.itemsize * 8 - 1, actual.dtype)
    both_nan = ((actual & ~sign) > nan_above) & ((expected & ~sign) > nan_above)
    wrong = np.flatnonzero((actual != expected) & ~both_nan)
    assert len(wrong) == 0, (
        f"{len(wrong)} of {len(actual)} differ, first at {wrong[0]}: "
        f"got {actual[wrong[0]]:#x}, expected {expected[wrong[0]]:#x}"
    )


def pairs() -> tuple[np.ndarray, np.ndarray]:
    """Random bit patterns, magnitudes of a similar size, and every pair of special ones."""
    random = np.random.default_rng(0)
    a, b = random.integers(0, 1 << 32, (2, 200_000), dtype=np.uint32)
    near = (a & 0x807FFFFF) | ((b & 0x7F800000) ^ (a & 0x01000000))
    left, right = (grid.reshape(-1) for grid in np.meshgrid(SPECIAL, SPECIAL))
    return np.concatenate([a, near, left]), np.concatenate([b, b, right])


@pytest.mark.parametrize(
    ("index", "operation"),
    [(0, torch.add), (1, torch.mul), (2, torch.div)],
    ids=["fadd_rn", "fmul_rn", "fdiv_rn"],
)
def test_operations_round_once(library: ctypes.CDLL, index: int, operation: object) -> None:
    a, b = pairs()
    result = np.empty_like(a)
    call(library.deepcomm_binary, index, size(a), a, b, result)
    assert callable(operation)
    expected = operation(as_floats(a), as_floats(b)).numpy().view(np.uint32)
    assert_same(result, expected, nan_above=0x7F800000)


def test_larger_halves_are_numpys(library: ctypes.CDLL) -> None:
    a, b = pairs()
    result = np.empty_like(a)
    call(library.deepcomm_max_halves, size(a), a, b, result)
    assert np.array_equal(result.view(np.uint16), np.maximum(a.view(np.uint16), b.view(np.uint16)))


def test_bf16_rounds_as_torch(library: ctypes.CDLL) -> None:
    other = np.roll(PATTERNS, 12345)
    packed = np.empty_like(PATTERNS)
    call(library.deepcomm_bf16, size(PATTERNS), PATTERNS, other, packed)
    for bits, operand in ((packed & 0xFFFF, PATTERNS), (packed >> 16, other)):
        expected = as_floats(operand).bfloat16().view(torch.int16).numpy().view(np.uint16)
        assert_same(bits.astype(np.uint16), expected, nan_above=0x7F80)


def test_bf16_widens_as_torch(library: ctypes.CDLL) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    packed = bits | bits[::-1].astype(np.uint32) << 16
    low, high = np.empty_like(packed), np.empty_like(packed)
    call(library.deepcomm_bf16_halves, size(packed), packed, low, high)
    for widened, source in ((low, bits), (high, bits[::-1].copy())):
        expected = torch.from_numpy(source.view(np.int16)).view(torch.bfloat16).float()
        assert np.array_equal(widened, expected.numpy().view(np.uint32))
    back = np.empty_like(bits)
    call(library.deepcomm_bf16_single, size(bits), bits, back)
    assert_same(back, bits, nan_above=0x7F80)


def test_e4m3_rounds_and_saturates_as_torch(library: ctypes.CDLL) -> None:
    other = np.roll(PATTERNS, 54321)
    packed = np.empty_like(PATTERNS)
    call(library.deepcomm_e4m3, size(PATTERNS), PATTERNS, other, packed)
    assert int(packed.max()) <= 0xFFFF
    for bits, operand in ((packed & 0xFF, PATTERNS), (packed >> 8, other)):
        clamped = as_floats(operand).clamp(-448, 448).to(torch.float8_e4m3fn)
        assert_same(bits.astype(np.uint8), clamped.view(torch.uint8).numpy(), nan_above=0x7E)


def tiles() -> torch.Tensor:
    """Rows of one tile: every exponent as the largest, mantissas around the ties, non-finite."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4096, 128, generator=generator)
    x *= torch.exp2(torch.arange(4096) % 250 - 125.0)[:, None]
    bits = torch.randint(-(1 << 31), 1 << 31, (2048, 128), generator=generator).int()
    wild = bits.view(torch.float32)
    powers = torch.zeros(256, 128)
    powers[:, 0] = (torch.arange(256).int() << 23).view(torch.float32)
    return torch.cat([x, wild, wild.nan_to_num(1.0), powers, 448 * powers])


@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
def test_cast_of_tiles_is_quantize_fp8(library: ctypes.CDLL, scale_format: str) -> None:
    x = tiles()
    expected = quantize_fp8(x, scale_format)
    data = np.empty((len(x), 128), np.uint8)
    scales = np.empty(len(x), np.uint32)
    is_ue8m0 = scale_format == "ue8m0"
    call(library.deepcomm_cast_tiles, is_ue8m0, size(scales), x.numpy(), data, scales)
    assert_same(
        data.reshape(-1), expected.data.view(torch.uint8).numpy().reshape(-1), nan_above=0x7E
    )
    stored = expected.scales.reshape(-1)
    if is_ue8m0:  # one byte of a word is in use
        assert np.array_equal(scales, stored.numpy().view(np.uint32))
        assert {0xFF, 105} <= set(scales.tolist())
    else:
        assert_same(scales, stored.view(torch.int32).numpy().view(np.uint32), 0x7F800000)


SOURCE = """
#include "device/device.cuh"
namespace deepcomm::kernels {
__global__ void convert(const float* x, unsigned* y) {
    using namespace deepcomm::device;
    const TileScale scale = fp32_tile_scale(magnitude_bits(x[0]));
    const float product = fmul_rn(x[1], scale.inverse);
    y[0] = e4m3x2_from_floats(fadd_rn(product, x[2]), product);
    y[1] = bf16x2_from_floats(x[3], x[4]) + warp_match(y[2]) + bf16_from_float(x[5]);
}
}
"""


@pytest.mark.nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a"])
def test_gpus_convert_by_their_instructions(arch: str) -> None:
    nvrtc = jit.find_nvrtc()
    headers = collect(CSRC, "device/device.cuh")
    unit = jit.TranslationUnit("convert.cu", SOURCE, headers, "deepcomm::kernels::convert", arch)
    ptx = nvrtc.compile(unit).ptx
    names = re.findall(r"^\s*(\w[\w.]+)\s", ptx, re.M)
    assert "cvt.rn.bf16x2.f32" in names
    assert "match.any.sync.b32" in names
    assert ("cvt.rn.satfinite.e4m3x2.f32" in names) == (arch != "sm_80")
    assert {"mul.rn.f32", "add.rn.f32", "div.rn.f32"} <= set(names)
    assert not any(name.startswith("fma") for name in names)


@pytest.mark.parametrize("number", [*range(1, 70), 127, 128, 255, 1000, 1023, 1024, 4097, 65536])
def test_divisor_divides_up_to_its_limit(library: ctypes.CDLL, number: int) -> None:
    limit = (1 << 31) // number  # of values, which it promises
    random = np.random.default_rng(number)
    multiples = random.integers(0, limit // number + 1, 20_000) * number
    values = np.concatenate(
        [random.integers(0, limit, 20_000), multiples, multiples + number - 1, [0, limit - 1]]
    )
    values = values[values < limit].astype(np.int32)
    quotients, remainders = np.zeros_like(values), np.zeros_like(values)
    call(
        library.deepcomm_divide, ctypes.c_int32(number), size(values), values, quotients, remainders
    )
    assert_same(quotients.view(np.uint32), (values // number).view(np.uint32), 1 << 32)
    assert_same(remainders.view(np.uint32), (values % number).view(np.uint32), 1 << 32)
