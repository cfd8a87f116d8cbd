// SPDX-License-Identifier: Apache-2.0
// Row operations without any instruction-set option: 16-byte vectors, which every compiler lowers to
// what the machine has.
#include <cstdint>
#include <cstring>

#include "cpu/simd/row_ops.hpp"
#include "cpu/simd/tables.hpp"

namespace deepcomm::cpu {
namespace {

struct Portable : Vectors<16> {
    static constexpr int kReducePairs = 4;

    static void stream(void* dst, U32 x) { store(dst, x); }

    static uint32_t max_lane(I32 x) {
        int32_t max = x[0];
        for (int i = 1; i < kLanes; ++i) max = max_of(max, x[i]);
        return static_cast<uint32_t>(max);
    }

    static void store_codes(void* dst, const U32 (&even)[2], const U32 (&odd)[2],
                            const U32 (&signed_halves)[2]) {
        for (int i = 0; i < 2; ++i) {
            const U32 codes = join_codes(even[i], odd[i], signed_halves[i]);
            store(static_cast<char*>(dst) + i * kVectorBytes / 2,
                  __builtin_convertvector(codes, U16Half));
        }
    }

    static void store_low8(void* dst, U32 x) { store(dst, __builtin_convertvector(x, U8Quarter)); }

    static F32 from_f16(const void* src) {
        const U32 half = __builtin_convertvector(load<U16Half>(src), U32);
        return bit_cast<F32>(widen_f16_magnitude<F32>(half & 0x7fffu) | ((half & 0x8000u) << 16));
    }

    /// Rounds to nearest even: below the smallest normal by adding 0.5, whose last bit is that of
    /// binary16's subnormals, above it on the bits.
    static U16Half to_f16(F32 x) {
        const U32 bits = bit_cast<U32>(x);
        const U32 magnitude = bits & 0x7fffffffu;
        const U32 tiny = bit_cast<U32>(bit_cast<F32>(magnitude) + 0.5f) - 0x3f000000u;
        const U32 normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
        const U32 infinity = U32{} + 0x7c00u;
        U32 half = magnitude < (113u << 23) ? tiny : normal;
        half = magnitude >= 0x477ff000u ? infinity : half;
        half = magnitude > 0x7f800000u ? ((magnitude >> 13) & 0x3ffu) | 0x7e00u : half;
        return __builtin_convertvector(half | ((bits >> 16) & 0x8000u), U16Half);
    }

    static U32 join(U16Half low, U16Half high) {
        const U16Half halves[2] = {low, high};
        return load<U32>(halves);
    }
};

}  // namespace

const RowOps& portable_row_ops() {
    static constexpr RowOps kOps = make_row_ops<Portable>();
    return kOps;
}

}  // namespace deepcomm::cpu
