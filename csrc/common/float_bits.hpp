// SPDX-License-Identifier: Apache-2.0
// Floating-point formats by their bits: exact wherever integers are, host or device.
#pragma once

#include "common/int.hpp"

namespace deepcomm {

constexpr uint32_t kSignBit = 0x80000000u;
constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr uint32_t kNanBits = 0x7fffffffu;  ///< what the GPU's arithmetic makes of every NaN

/// BF16 of FP32, rounded to nearest even; any NaN becomes the one of cvt.rn.bf16.f32.
///
///   0x3f808000 = 1 + 2^-8, a tie -> 0x3f80 = 1        0x3f818000 -> 0x3f82
constexpr uint32_t bf16_from_float_bits(uint32_t bits) {
    if ((bits & ~kSignBit) > kInfinityBits) return 0x7fffu;
    return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

/// E4M3 of FP32, rounded to nearest even, saturated at 448; any NaN becomes 0x7f: the bits of
/// cvt.rn.satfinite.e4m3x2.f32.
constexpr uint32_t e4m3_from_float_bits(uint32_t bits) {
    constexpr uint32_t kMaxFinite = 0x7eu;  // 448
    constexpr uint32_t kNan = 0x7fu;
    constexpr uint32_t kSmallestNormal = 121u << 23;  // 2^-6
    constexpr uint32_t kHalfOfSmallest = 117u << 23;  // 2^-10, a tie with 0
    constexpr uint32_t kExponentOffset = 120u << 3;   // biases 127 and 7
    const uint32_t magnitude = bits & ~kSignBit;
    const uint32_t sign = bits >> 24 & 0x80u;
    if (magnitude > kInfinityBits) return kNan;
    if (magnitude <= kHalfOfSmallest) return sign;
    if (magnitude < kSmallestNormal) {
        // In units of 2^-9, the smallest subnormal: example 2^-7 = 0x3c000000, shift 21, 4 units.
        const uint32_t shift = 141u - (magnitude >> 23);
        const uint32_t significand = (magnitude & 0x7fffffu) | 0x800000u;
        const uint32_t half = (1u << (shift - 1)) - 1u + (significand >> shift & 1u);
        return sign | (significand + half) >> shift;
    }
    const uint32_t rounded = (magnitude + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20;
    const uint32_t value = rounded - kExponentOffset;
    return sign | (value < kMaxFinite ? value : kMaxFinite);
}

static_assert(bf16_from_float_bits(0x3f808000u) == 0x3f80u, "ties go to even");
static_assert(bf16_from_float_bits(0x3f818000u) == 0x3f82u, "ties go to even");
static_assert(bf16_from_float_bits(0x7f7fffffu) == 0x7f80u, "the largest rounds to infinity");
static_assert(e4m3_from_float_bits(0x3e99999au) == 0x2au, "0.3 is 10 eighths of 2^-2");
static_assert(e4m3_from_float_bits(0xc3e80000u) == 0xfeu, "-464 saturates");
static_assert(e4m3_from_float_bits(0x3c000000u) == 0x04u, "2^-7 is subnormal");

}  // namespace deepcomm
