// SPDX-License-Identifier: Apache-2.0
// The FP8 cast of one row, for any instruction set V (see the note in vector.hpp on including this).
#pragma once

#include "cpu/simd/vector.hpp"

namespace deepcomm::cpu {
namespace {

constexpr float kE4m3Max = 448.0f;
constexpr float kAmaxFloor = 1e-4f;
constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr uint32_t kNanBits = 0x7fc00000u;

/// One FP32 scale a tile. An infinite amax gives inv = 0 and a NaN one NaN: x * inv does the rest.
struct Fp32Scale {
    using Type = float;

    static Type make(float amax, float& inv) {
        inv = kE4m3Max / amax;
        return amax / kE4m3Max;
    }
};

/// One exponent byte a tile: amax / 448 rounded up to a power of two. With amax between 1e-4 and the
/// largest float the exponent is 105..247, so both the scale and its inverse are normal numbers.
struct Ue8m0Scale {
    using Type = uint8_t;

    static Type make(float amax, float& inv) {
        const auto bits = bit_cast<uint32_t>(amax / kE4m3Max);
        if (bits >= kInfinityBits) {
            inv = bit_cast<float>(kNanBits);
            return 0xff;
        }
        const uint32_t exponent = (bits >> 23) + ((bits & 0x7fffffu) != 0);
        inv = bit_cast<float>((254 - exponent) << 23);
        return static_cast<Type>(exponent);
    }
};

/// E4M3 bits of x, in the low byte of each lane; |x| below 464, hence no saturation.
///
/// Adding 2^(e + 20), e the exponent of x but at least -6, leaves just the three mantissa bits of
/// E4M3 in the sum: FP32's own rounding to nearest even does the work, subnormals included.
/// Example: x = 0.3 = 1.2 * 2^-2 gives n = round(1.2 * 8) = 10, bits 10 + (-2 + 6) * 8 = 0x2a = 0.3125.
template <class V>
inline typename V::U32 to_e4m3(typename V::F32 x) {
    using U32 = typename V::U32;
    const auto bits = bit_cast<U32>(x);
    const typename V::I32 smallest = typename V::I32{} + (121 << 23);
    const auto exponent =
        bit_cast<U32>(max_of(bit_cast<typename V::I32>(bits & kInfinityBits), smallest));
    const U32 magic = (exponent + (20u << 23)) | (bits & 0x80000000u);
    const U32 rounded = bit_cast<U32>(x + bit_cast<typename V::F32>(magic)) - magic;
    return (rounded + (exponent >> 20) - (121u << 3)) | ((bits >> 24) & 0x80u);
}

/// to_e4m3(x * inv) where either may be infinite or NaN. A NaN of x keeps its sign.
template <class V>
inline typename V::U32 to_e4m3_nonfinite(typename V::F32 x, typename V::F32 inv) {
    using U32 = typename V::U32;
    const typename V::F32 product = x * inv;
    const U32 signs = x != x ? bit_cast<U32>(x) : bit_cast<U32>(product);
    const U32 nan = ((signs >> 24) & 0x80u) | 0x7fu;
    return product != product ? nan : to_e4m3<V>(product);
}

template <class V, class Codec>
inline void store_fp8(uint8_t* dst, typename V::U32 a, typename V::U32 b) {
    if constexpr (Codec::kInterleaved) {
        V::store_low16(dst, a | (b << 8));
    } else {
        V::store_low8(dst, a);
        V::store_low8(dst + V::kLanes, b);
    }
}

/// Casts one whole tile and returns its scale.
template <class V, class Codec, class Scale>
inline typename Scale::Type cast_tile(uint8_t* dst, const char* src) {
    const uint32_t amax_bits = max_of(Codec::amax_bits(src), bit_cast<uint32_t>(kAmaxFloor));
    float inv_scalar;
    const auto scale = Scale::make(bit_cast<float>(amax_bits), inv_scalar);
    const typename V::F32 inv = typename V::F32{} + inv_scalar;
    const bool finite = amax_bits < kInfinityBits;
    for (int i = 0; i < kScaleTile; i += 2 * V::kLanes) {
        const Pair<V> x = Codec::load_pair(src + i * Codec::kElementBytes);
        if (__builtin_expect(finite, true)) {
            store_fp8<V, Codec>(dst + i, to_e4m3<V>(x.a * inv), to_e4m3<V>(x.b * inv));
        } else {
            store_fp8<V, Codec>(dst + i, to_e4m3_nonfinite<V>(x.a, inv),
                                to_e4m3_nonfinite<V>(x.b, inv));
        }
    }
    return scale;
}

template <class V, class Codec, class Scale>
void cast_row(uint8_t* dst, typename Scale::Type* scales, const void* src, int64_t num_elements) {
    constexpr int64_t kTileBytes = kScaleTile * Codec::kElementBytes;
    const char* tile = static_cast<const char*>(src);
    int64_t left = num_elements;
    for (; left >= kScaleTile; left -= kScaleTile, dst += kScaleTile, tile += kTileBytes) {
        for (int64_t line = 0; line < kTileBytes; line += 64) {
            __builtin_prefetch(tile + kPrefetchBytes + line);
        }
        *scales++ = cast_tile<V, Codec, Scale>(dst, tile);
    }
    if (left == 0) return;
    char padded[kTileBytes] = {};
    uint8_t cast[kScaleTile];
    std::memcpy(padded, tile, static_cast<size_t>(left * Codec::kElementBytes));
    *scales = cast_tile<V, Codec, Scale>(cast, padded);
    std::memcpy(dst, cast, static_cast<size_t>(left));
}

template <class V, class Scale>
void cast_fp8(uint8_t* dst, typename Scale::Type* scales, const void* src, DType dtype,
              int64_t num_elements) {
    switch (dtype) {
        case DType::kBf16: return cast_row<V, Bf16Codec<V>, Scale>(dst, scales, src, num_elements);
        case DType::kF16: return cast_row<V, F16Codec<V>, Scale>(dst, scales, src, num_elements);
        default: return cast_row<V, F32Codec<V>, Scale>(dst, scales, src, num_elements);
    }
}

}  // namespace
}  // namespace deepcomm::cpu
