// SPDX-License-Identifier: Apache-2.0
// Vectors of one instruction set and the element types on them, written once with the compiler's
// vector extension; an instruction set (V) adds the few operations that the extension lacks.
//
// NOTE: included once by each instruction set's .cpp, between its target options and after all
// standard headers. The unnamed namespace keeps the linker from merging code of two sets.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/types.hpp"

namespace deepcomm::cpu {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
              "elements are split by little-endian rules");

/// How far ahead rows are prefetched. PERF(Zen 5, 2026-11): hardware stops at each page; reducing 2 or
/// 4 scattered rows takes 3.8 / 4.8 us without, 2.4 / 2.8 us with 1536 (512: 3.1 / 3.5, 2048: the same,
/// but 8 rows lose 10 %).
constexpr int kPrefetchBytes = 1536;

template <int kBytes>
struct Vectors {
    typedef float F32 __attribute__((vector_size(kBytes)));
    typedef uint32_t U32 __attribute__((vector_size(kBytes)));
    typedef int32_t I32 __attribute__((vector_size(kBytes)));
    typedef int16_t I16 __attribute__((vector_size(kBytes)));
    typedef uint16_t U16Half __attribute__((vector_size(kBytes / 2)));
    typedef uint8_t U8Quarter __attribute__((vector_size(kBytes / 4)));
    static constexpr int kLanes = kBytes / 4;
    static constexpr int kVectorBytes = kBytes;
};

template <class To, class From>
inline To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

template <class T>
inline T load(const void* src) {
    T value;
    std::memcpy(&value, src, sizeof(value));
    return value;
}

template <class T>
inline void store(void* dst, const T& value) {
    std::memcpy(dst, &value, sizeof(value));
}

template <class T>
inline T max_of(T a, T b) {
    return a > b ? a : b;
}

/// Of each lane the low bytes of even and odd, whose bit 7 is clear, with the signs of its two halves:
/// 16 bits; the others are undefined.
template <class U>
inline U join_codes(U even, U odd, U signed_halves) {
    const U signs = signed_halves & 0x80008000u;
    return (even & 0x7fu) | (odd << 8) | (signs >> 8) | (signs >> 16);
}

/// Two vectors of FP32, in the order that their codec finds cheapest.
template <class V>
struct Pair {
    typename V::F32 a;
    typename V::F32 b;
};

/// FP32 bits of non-negative binary16 bits. Exact; a NaN keeps its payload.
template <class F, class U>
inline U widen_f16_magnitude(U half) {
    const U infinity = U{} + 0x7f800000u;
    const U bits = bit_cast<U>(bit_cast<F>(half << 13) * 0x1p112f);
    return half >= 0x7c00u ? bits | infinity : bits;
}

/// Lane-wise maximum of the magnitude bits of a tile of 16-bit floats.
template <class V>
inline typename V::I16 max_magnitude16(const void* tile) {
    typename V::I16 max = {};
    for (int offset = 0; offset < kScaleTile * 2; offset += V::kVectorBytes) {
        const auto x = load<typename V::I16>(static_cast<const char*>(tile) + offset);
        max = max_of<typename V::I16>(max, x & int16_t{0x7fff});
    }
    return max;
}

/// BF16: a 32-bit lane holds an even element (low) and an odd one (high), so `a` takes the even and
/// `b` the odd elements, by one operation each.
template <class V>
struct Bf16Codec {
    static constexpr bool kInterleaved = true;
    static constexpr int kElementBytes = 2;

    static Pair<V> load_pair(const void* src) {
        const auto lanes = load<typename V::U32>(src);
        return {bit_cast<typename V::F32>(lanes << 16),
                bit_cast<typename V::F32>(lanes & 0xffff0000u)};
    }

    static void store_pair(void* dst, Pair<V> x, bool stream) {
        const typename V::U32 lanes = (rounded(x.a) >> 16) | (rounded(x.b) & 0xffff0000u);
        stream ? V::stream(dst, lanes) : store(dst, lanes);
    }

    /// FP32 bits of the largest magnitude of a tile; a NaN is larger than any number.
    static uint32_t amax_bits(const void* tile) {
        const auto max = bit_cast<typename V::U32>(max_magnitude16<V>(tile));
        return V::max_lane(max_of(bit_cast<typename V::I32>(max & 0xffff0000u),
                                  bit_cast<typename V::I32>(max << 16)));
    }

  private:
    /// FP32 bits whose upper half is x rounded to nearest even.
    static typename V::U32 rounded(typename V::F32 x) {
        const auto bits = bit_cast<typename V::U32>(x);
        const typename V::U32 nearest = bits + 0x7fffu + ((bits >> 16) & 1u);
        return x != x ? bits | 0x00400000u : nearest;
    }
};

template <class V>
struct F16Codec {
    static constexpr bool kInterleaved = false;
    static constexpr int kElementBytes = 2;

    static Pair<V> load_pair(const void* src) {
        const char* bytes = static_cast<const char*>(src);
        return {V::from_f16(bytes), V::from_f16(bytes + V::kVectorBytes / 2)};
    }

    static void store_pair(void* dst, Pair<V> x, bool stream) {
        const auto lanes = V::join(V::to_f16(x.a), V::to_f16(x.b));
        stream ? V::stream(dst, lanes) : store(dst, lanes);
    }

    static uint32_t amax_bits(const void* tile) {
        const auto max = bit_cast<typename V::U32>(max_magnitude16<V>(tile));
        const uint32_t half = V::max_lane(
            max_of(bit_cast<typename V::I32>(max >> 16), bit_cast<typename V::I32>(max & 0xffffu)));
        return widen_f16_magnitude<float>(half);
    }
};

template <class V>
struct F32Codec {
    static constexpr bool kInterleaved = false;
    static constexpr int kElementBytes = 4;

    static Pair<V> load_pair(const void* src) { return load<Pair<V>>(src); }

    static void store_pair(void* dst, Pair<V> x, bool stream) {
        if (!stream) return store(dst, x);
        V::stream(dst, bit_cast<typename V::U32>(x.a));
        V::stream(static_cast<char*>(dst) + V::kVectorBytes, bit_cast<typename V::U32>(x.b));
    }

    static uint32_t amax_bits(const void* tile) {
        typename V::I32 max = {};
        for (int offset = 0; offset < kScaleTile * 4; offset += V::kVectorBytes) {
            const auto x = load<typename V::I32>(static_cast<const char*>(tile) + offset);
            max = max_of<typename V::I32>(max, x & 0x7fffffff);
        }
        return V::max_lane(max);
    }
};

}  // namespace
}  // namespace deepcomm::cpu
