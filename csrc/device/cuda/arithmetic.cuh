// SPDX-License-Identifier: Apache-2.0
// Floating-point arithmetic to the bit: each operation rounds once, none is contracted, whatever
// the compiler's options. A NaN that comes out has no defined sign or payload.
#pragma once

#include "common/float_bits.hpp"
#include "device/cuda/platform.cuh"

namespace deepcomm::device {

DEEPCOMM_DEVICE uint32_t float_bits(float value) { return __float_as_uint(value); }
DEEPCOMM_DEVICE float float_from_bits(uint32_t bits) { return __uint_as_float(bits); }

DEEPCOMM_DEVICE float fadd_rn(float a, float b) { return __fadd_rn(a, b); }
DEEPCOMM_DEVICE float fmul_rn(float a, float b) { return __fmul_rn(a, b); }
DEEPCOMM_DEVICE float fdiv_rn(float a, float b) { return __fdiv_rn(a, b); }

/// The larger of both low halves and of both high halves, as unsigned integers.
DEEPCOMM_DEVICE uint32_t max_u16x2(uint32_t a, uint32_t b) { return __vmaxu2(a, b); }

/// Two BF16, low half first, rounded to nearest even.
DEEPCOMM_DEVICE uint32_t bf16x2_from_floats(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

/// Two E4M3 in the low half of the word, low byte first: nearest even, saturated at 448.
DEEPCOMM_DEVICE uint32_t e4m3x2_from_floats(float low, float high) {
#if __CUDA_ARCH__ >= 890
    uint16_t packed;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
    return packed;
#else
    return e4m3_from_float_bits(float_bits(low)) | e4m3_from_float_bits(float_bits(high)) << 8;
#endif
}

}  // namespace deepcomm::device
