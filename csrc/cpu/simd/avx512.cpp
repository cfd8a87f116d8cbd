// SPDX-License-Identifier: Apache-2.0
// Row operations for AVX-512 (F, BW, VL, DQ).
#include "cpu/simd/tables.hpp"

#if DEEPCOMM_SIMD_X86
// GCC 12 takes the "undefined" operand of its own intrinsics for an uninitialised variable.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")

#include "cpu/simd/row_ops.hpp"

namespace deepcomm::cpu {
namespace {

struct Avx512 : Vectors<64> {
    static constexpr int kReducePairs = 4;

    static void stream(void* dst, U32 x) {
        _mm512_stream_si512(static_cast<__m512i*>(dst), bit_cast<__m512i>(x));
    }

    static uint32_t max_lane(I32 x) {
        return static_cast<uint32_t>(_mm512_reduce_max_epi32(bit_cast<__m512i>(x)));
    }

    static void store_codes(void* dst, const U32 (&even)[2], const U32 (&odd)[2],
                            const U32 (&signed_halves)[2]) {
        for (int i = 0; i < 2; ++i) {
            const U32 codes = join_codes(even[i], odd[i], signed_halves[i]);
            store(static_cast<char*>(dst) + i * kVectorBytes / 2,
                  _mm512_cvtepi32_epi16(bit_cast<__m512i>(codes)));
        }
    }

    static void store_low8(void* dst, U32 x) {
        store(dst, _mm512_cvtepi32_epi8(bit_cast<__m512i>(x)));
    }

    static F32 from_f16(const void* src) {
        return bit_cast<F32>(_mm512_cvtph_ps(load<__m256i>(src)));
    }

    static __m256i to_f16(F32 x) {
        return _mm512_cvtps_ph(bit_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT);
    }

    static U32 join(__m256i low, __m256i high) {
        return bit_cast<U32>(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
    }
};

}  // namespace

const RowOps& avx512_row_ops() {
    static constexpr RowOps kOps = make_row_ops<Avx512>();
    return kOps;
}

}  // namespace deepcomm::cpu

#pragma GCC pop_options
#endif
