// SPDX-License-Identifier: Apache-2.0
// Conversions of row elements and the scales of the FP8 cast, to the bit as deepcomm/fp8.py.
#pragma once

#include "common/types.hpp"
#include "device/primitives.cuh"

namespace deepcomm::device {

DEEPCOMM_DEVICE float bf16x2_low(uint32_t packed) { return float_from_bits(packed << 16); }
DEEPCOMM_DEVICE float bf16x2_high(uint32_t packed) { return float_from_bits(packed & 0xffff0000u); }

DEEPCOMM_DEVICE float float_from_bf16(uint16_t bits) {
    return float_from_bits(static_cast<uint32_t>(bits) << 16);
}
DEEPCOMM_DEVICE uint16_t bf16_from_float(float value) {
    return static_cast<uint16_t>(bf16x2_from_floats(value, 0.0f));
}

/// Four E4M3, lowest byte first.
DEEPCOMM_DEVICE uint32_t e4m3x4_from_floats(float a, float b, float c, float d) {
    return e4m3x2_from_floats(a, b) | e4m3x2_from_floats(c, d) << 16;
}

constexpr float kE4m3Max = 448.0f;
constexpr uint32_t kAmaxFloorBits = 0x38d1b717u;  ///< 1e-4
constexpr uint32_t kUe8m0Nan = 0xffu;

/// |value| as an integer: such bits are ordered like the magnitudes, with NaN above all, so that
/// the largest of a tile is an integer maximum. Start it from kAmaxFloorBits.
DEEPCOMM_DEVICE uint32_t magnitude_bits(float value) { return float_bits(value) & ~kSignBit; }

/// What the elements of a tile are multiplied by before the cast, and what is stored beside them.
struct TileScale {
    float inverse;
    uint32_t stored;  ///< bits of the FP32 scale, or the UE8M0 exponent byte
};

/// One FP32 scale for a tile of that largest magnitude, at least kAmaxFloorBits.
DEEPCOMM_DEVICE TileScale fp32_tile_scale(uint32_t amax_bits) {
    const float amax = float_from_bits(amax_bits);
    return {fdiv_rn(kE4m3Max, amax), float_bits(fdiv_rn(amax, kE4m3Max))};
}

/// The same as an exponent byte: amax / 448 rounded up to a power of two, whose inverse is exact.
/// A tile that is not finite becomes NaN as a whole.
DEEPCOMM_DEVICE TileScale ue8m0_tile_scale(uint32_t amax_bits) {
    const uint32_t bits = float_bits(fdiv_rn(float_from_bits(amax_bits), kE4m3Max));
    if ((bits & ~kSignBit) >= kInfinityBits) return {float_from_bits(kNanBits), kUe8m0Nan};
    const uint32_t exponent = (bits >> 23) + ((bits & 0x7fffffu) != 0);
    return {float_from_bits((254u - exponent) << 23), exponent};
}

}  // namespace deepcomm::device
