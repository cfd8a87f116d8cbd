// SPDX-License-Identifier: Apache-2.0
// The tables behind row_ops(), one per instruction set that is compiled in.
#pragma once

#include "cpu/simd/simd.hpp"

// The wider sets rely on GCC's target pragma; other compilers and architectures get the portable one.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define DEEPCOMM_SIMD_X86 1
#else
#define DEEPCOMM_SIMD_X86 0
#endif

namespace deepcomm::cpu {

const RowOps& portable_row_ops();
#if DEEPCOMM_SIMD_X86
const RowOps& avx2_row_ops();
const RowOps& avx512_row_ops();
#endif

}  // namespace deepcomm::cpu
