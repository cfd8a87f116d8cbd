// SPDX-License-Identifier: Apache-2.0
// Emulated counterpart of cuda/arithmetic.cuh; units that include it are compiled with
// -ffp-contract=off.
#pragma once

#include "common/float_bits.hpp"
#include "device/emu/platform.cuh"

namespace deepcomm::device {

inline uint32_t float_bits(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float float_from_bits(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

inline float fadd_rn(float a, float b) { return a + b; }
inline float fmul_rn(float a, float b) { return a * b; }
inline float fdiv_rn(float a, float b) { return a / b; }

inline uint32_t max_u16x2(uint32_t a, uint32_t b) {
    constexpr uint32_t kHigh = 0xFFFF0000u;
    const uint32_t low = (a & ~kHigh) > (b & ~kHigh) ? a : b;
    const uint32_t high = (a & kHigh) > (b & kHigh) ? a : b;
    return (high & kHigh) | (low & ~kHigh);
}

inline uint32_t bf16x2_from_floats(float low, float high) {
    return bf16_from_float_bits(float_bits(low)) | bf16_from_float_bits(float_bits(high)) << 16;
}

inline uint32_t e4m3x2_from_floats(float low, float high) {
    return e4m3_from_float_bits(float_bits(low)) | e4m3_from_float_bits(float_bits(high)) << 8;
}

}  // namespace deepcomm::device
