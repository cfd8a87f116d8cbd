// SPDX-License-Identifier: Apache-2.0
// The table of one instruction set V (see the note in vector.hpp on including this).
#pragma once

#include "cpu/simd/cast.hpp"
#include "cpu/simd/copy.hpp"
#include "cpu/simd/reduce.hpp"

namespace deepcomm::cpu {
namespace {

template <class V>
constexpr RowOps make_row_ops() {
    return {copy, copy_stream<V>, cast_fp8<V, Fp32Scale>, cast_fp8<V, Ue8m0Scale>, reduce<V>};
}

}  // namespace
}  // namespace deepcomm::cpu
