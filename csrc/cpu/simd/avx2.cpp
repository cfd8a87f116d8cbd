// SPDX-License-Identifier: Apache-2.0
// Row operations for AVX2 with F16C.
#include "cpu/simd/tables.hpp"

#if DEEPCOMM_SIMD_X86
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#pragma GCC push_options
#pragma GCC target("avx2,f16c")

#include "cpu/simd/row_ops.hpp"

namespace deepcomm::cpu {
namespace {

struct Avx2 : Vectors<32> {
    static constexpr int kReducePairs = 2;

    static void stream(void* dst, U32 x) {
        _mm256_stream_si256(static_cast<__m256i*>(dst), bit_cast<__m256i>(x));
    }

    static uint32_t max_lane(I32 x) {
        const auto wide = bit_cast<__m256i>(x);
        __m128i max =
            _mm_max_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
        max = _mm_max_epi32(max, _mm_shuffle_epi32(max, 0x4e));
        max = _mm_max_epi32(max, _mm_shuffle_epi32(max, 0xb1));
        return static_cast<uint32_t>(_mm_cvtsi128_si32(max));
    }

    static void store_codes(void* dst, const U32 (&even)[2], const U32 (&odd)[2],
                            const U32 (&signed_halves)[2]) {
        __m256i codes[2];
        for (int i = 0; i < 2; ++i) {
            const __m256i halves = _mm256_blend_epi16(bit_cast<__m256i>(even[i]),
                                                      bit_cast<__m256i>(odd[i] << 16), 0xaa);
            codes[i] = _mm256_and_si256(halves, _mm256_set1_epi16(0x7f));
        }
        const __m256i signs = _mm256_packs_epi16(bit_cast<__m256i>(signed_halves[0]),
                                                 bit_cast<__m256i>(signed_halves[1]));
        const __m256i bytes =
            _mm256_or_si256(_mm256_packus_epi16(codes[0], codes[1]),
                            _mm256_and_si256(signs, _mm256_set1_epi8(static_cast<char>(0x80))));
        store(dst, _mm256_permute4x64_epi64(bytes, 0xd8));
    }

    static void store_low8(void* dst, U32 x) {
        const auto lanes = bit_cast<__m256i>(x & 0xffu);
        const __m128i words =
            _mm_packus_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
        store(dst, static_cast<int64_t>(_mm_cvtsi128_si64(_mm_packus_epi16(words, words))));
    }

    static F32 from_f16(const void* src) {
        return bit_cast<F32>(_mm256_cvtph_ps(load<__m128i>(src)));
    }

    static __m128i to_f16(F32 x) {
        return _mm256_cvtps_ph(bit_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT);
    }

    static U32 join(__m128i low, __m128i high) {
        return bit_cast<U32>(_mm256_set_m128i(high, low));
    }
};

}  // namespace

const RowOps& avx2_row_ops() {
    static constexpr RowOps kOps = make_row_ops<Avx2>();
    return kOps;
}

}  // namespace deepcomm::cpu

#pragma GCC pop_options
#endif
