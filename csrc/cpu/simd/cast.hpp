// SPDX-License-Identifier: Apache-2.0
// The FP8 cast of one row, for any instruction set V (see the note in vector.hpp on including this).
#pragma once

#include "cpu/simd/simd.hpp"
#include "cpu/simd/vector.hpp"

namespace deepcomm::cpu {
namespace {

constexpr float kE4m3Max = 448.0f;
constexpr float kAmaxFloor = 1e-4f;
constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr uint32_t kNanBits = 0x7fc00000u;
constexpr uint32_t kMagnitudeBits = 0x7fffffffu;
/// Tiles of one pass: with the next ones and their casts they fit the first-level cache.
constexpr int64_t kTilesAtOnce = 16;

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

/// Seven E4M3 bits of x in the low byte of each lane, bit 7 clear; other bytes are undefined.
/// 0 <= x < 464, hence no saturation.
///
/// Adding 2^(e + 20), e the exponent of x but at least -6, leaves just the three mantissa bits of
/// E4M3 in the sum: FP32's own rounding to nearest even does the work, subnormals included. The low
/// byte of the sum counts eighths of 2^e; adding the exponents' bits makes the code, modulo 256, up
/// to a constant, which is even and so can be part of what is added first.
/// Example: x = 0.3 = 1.2 * 2^-2 gives n = round(1.2 * 8) = 10, bits 10 + (-2 + 6) * 8 = 0x2a = 0.3125.
template <class V>
inline typename V::U32 magnitude_to_e4m3(typename V::F32 x) {
    using U32 = typename V::U32;
    constexpr uint32_t kSmallest = 121u << 23;  // 2^-6
    constexpr uint32_t kShift = 20u << 23;
    constexpr uint32_t kBias = (256u - ((kSmallest + kShift) >> 20) % 256u) % 256u;
    static_assert(kBias % 2 == 0 && kBias + 16 < 256);
    const typename V::I32 smallest = typename V::I32{} + int32_t{kSmallest};
    const U32 exponent = bit_cast<U32>(
        max_of<typename V::I32>(bit_cast<typename V::I32>(x) & int32_t{kInfinityBits}, smallest));
    const U32 magic = exponent + (kShift + kBias);
    return bit_cast<U32>(x + bit_cast<typename V::F32>(magic)) + (magic >> 20);
}

/// E4M3 bits of x * inv, in the low byte of each lane; the others are undefined.
template <class V>
inline typename V::U32 to_e4m3(typename V::F32 x, typename V::F32 inv) {
    using U32 = typename V::U32;
    const U32 bits = bit_cast<U32>(x);
    const U32 code = magnitude_to_e4m3<V>(bit_cast<typename V::F32>(bits & kMagnitudeBits) * inv);
    return code | ((bits >> 24) & 0x80u);
}

/// The same where x or inv may be infinite or NaN. A NaN of x keeps its sign.
template <class V>
inline typename V::U32 to_e4m3_nonfinite(typename V::F32 x, typename V::F32 inv) {
    using U32 = typename V::U32;
    const typename V::F32 product = x * inv;
    const U32 signs = x != x ? bit_cast<U32>(x) : bit_cast<U32>(product);
    const U32 nan = ((signs >> 24) & 0x80u) | 0x7fu;
    return product != product ? nan : to_e4m3<V>(x, inv);
}

/// The cast of two vectors of BF16 as they come, even elements in the low and odd ones in the high half
/// of a lane.
template <class V>
inline void cast_bf16(uint8_t* dst, const char* src, typename V::F32 inv) {
    using U32 = typename V::U32;
    U32 lanes[2];
    U32 even[2];
    U32 odd[2];
    for (int i = 0; i < 2; ++i) {
        lanes[i] = load<U32>(src + i * V::kVectorBytes);
        const U32 low = (lanes[i] << 16) & kMagnitudeBits;
        const U32 high = lanes[i] & (kMagnitudeBits & 0xffff0000u);
        even[i] = magnitude_to_e4m3<V>(bit_cast<typename V::F32>(low) * inv);
        odd[i] = magnitude_to_e4m3<V>(bit_cast<typename V::F32>(high) * inv);
    }
    V::store_codes(dst, even, odd, lanes);
}

/// Casts one whole tile of finite numbers.
template <class V, class Codec>
inline void cast_finite(uint8_t* dst, const char* src, typename V::F32 inv) {
    constexpr int kPairElements = 2 * V::kLanes;
    constexpr int kPairBytes = kPairElements * Codec::kElementBytes;
    for (int i = 0; i < kScaleTile; i += 2 * kPairElements) {
        const char* const from = src + i * Codec::kElementBytes;
        if constexpr (Codec::kInterleaved) {
            cast_bf16<V>(dst + i, from, inv);
        } else {
            for (int pair = 0; pair < 2; ++pair) {
                const Pair<V> x = Codec::load_pair(from + pair * kPairBytes);
                uint8_t* const to = dst + i + pair * kPairElements;
                V::store_low8(to, to_e4m3<V>(x.a, inv));
                V::store_low8(to + V::kLanes, to_e4m3<V>(x.b, inv));
            }
        }
    }
}

template <class V, class Codec>
inline void cast_nonfinite(uint8_t* dst, const char* src, typename V::F32 inv) {
    constexpr int kPairElements = 2 * V::kLanes;
    for (int i = 0; i < kScaleTile; i += kPairElements) {
        const Pair<V> x = Codec::load_pair(src + i * Codec::kElementBytes);
        uint8_t a[V::kLanes];
        uint8_t b[V::kLanes];
        V::store_low8(a, to_e4m3_nonfinite<V>(x.a, inv));
        V::store_low8(b, to_e4m3_nonfinite<V>(x.b, inv));
        for (int lane = 0; lane < V::kLanes; ++lane) {
            dst[i + (Codec::kInterleaved ? 2 * lane : lane)] = a[lane];
            dst[i + (Codec::kInterleaved ? 2 * lane + 1 : V::kLanes + lane)] = b[lane];
        }
    }
}

/// Writes one tile of codes to all copies, past the caches.
template <class V>
inline void stream_tile(const CastCopies& copies, int64_t offset, const uint8_t* codes) {
    constexpr int kVectors = kScaleTile / V::kVectorBytes;
    for (int32_t copy = 0; copy < copies.count; ++copy) {
        std::byte* const to = copies.rows[copy] + offset;
        for (int i = 0; i < kVectors; ++i) {
            V::stream(to + i * V::kVectorBytes, load<typename V::U32>(codes + i * V::kVectorBytes));
        }
    }
}

/// Casts whole tiles. The maxima of all come first: their latency would keep the cast waiting, which
/// then reads from the first-level cache. kAhead: the tiles behind are wanted next. Calls done with
/// each tile that is cast.
template <class V, class Codec, class Scale, bool kAhead, class Done>
inline void cast_tiles(uint8_t* dst, typename Scale::Type* scales, const char* src,
                       int64_t num_tiles, Done&& done) {
    constexpr int64_t kTileBytes = kScaleTile * Codec::kElementBytes;
    float amax[kTilesAtOnce];
    float inv[kTilesAtOnce];
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
        const uint32_t bits = Codec::amax_bits(src + tile * kTileBytes);
        amax[tile] = bit_cast<float>(max_of(bits, bit_cast<uint32_t>(kAmaxFloor)));
    }
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
        scales[tile] = Scale::make(amax[tile], inv[tile]);
    }
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
        const char* const from = src + tile * kTileBytes;
        if constexpr (kAhead) {
            for (int64_t line = 0; line < kTileBytes; line += 64) {
                __builtin_prefetch(from + kTilesAtOnce * kTileBytes + line);
            }
        }
        const typename V::F32 factor = typename V::F32{} + inv[tile];
        if (__builtin_expect(bit_cast<uint32_t>(amax[tile]) < kInfinityBits, true)) {
            cast_finite<V, Codec>(dst + tile * kScaleTile, from, factor);
        } else {
            cast_nonfinite<V, Codec>(dst + tile * kScaleTile, from, factor);
        }
        done(tile);
    }
}

template <class V, class Codec, class Scale>
void cast_row(uint8_t* dst, typename Scale::Type* scales, const void* src, int64_t num_elements,
              const CastCopies& copies) {
    constexpr int64_t kTileBytes = kScaleTile * Codec::kElementBytes;
    const char* from = static_cast<const char*>(src);
    const int64_t num_tiles = num_elements / kScaleTile;
    for (int64_t tile = 0; tile < num_tiles; tile += kTilesAtOnce) {
        const int64_t count = num_tiles - tile < kTilesAtOnce ? num_tiles - tile : kTilesAtOnce;
        cast_tiles<V, Codec, Scale, true>(dst + tile * kScaleTile, scales + tile,
                                          from + tile * kTileBytes, count, [&](int64_t done) {
                                              const int64_t offset = (tile + done) * kScaleTile;
                                              stream_tile<V>(copies, offset, dst + offset);
                                          });
    }
    const int64_t left = num_elements - num_tiles * kScaleTile;
    if (left == 0) return;
    char padded[kTileBytes] = {};
    uint8_t cast[kScaleTile];
    std::memcpy(padded, from + num_tiles * kTileBytes,
                static_cast<size_t>(left * Codec::kElementBytes));
    cast_tiles<V, Codec, Scale, false>(cast, scales + num_tiles, padded, 1, [](int64_t) {});
    std::memcpy(dst + num_tiles * kScaleTile, cast, static_cast<size_t>(left));
    for (int32_t copy = 0; copy < copies.count; ++copy) {
        std::memcpy(copies.rows[copy] + num_tiles * kScaleTile, cast, static_cast<size_t>(left));
    }
}

template <class V, class Scale>
void cast_fp8(uint8_t* dst, typename Scale::Type* scales, const void* src, DType dtype,
              int64_t num_elements, const CastCopies& copies) {
    switch (dtype) {
        case DType::kBf16:
            return cast_row<V, Bf16Codec<V>, Scale>(dst, scales, src, num_elements, copies);
        case DType::kF16:
            return cast_row<V, F16Codec<V>, Scale>(dst, scales, src, num_elements, copies);
        default: return cast_row<V, F32Codec<V>, Scale>(dst, scales, src, num_elements, copies);
    }
}

}  // namespace
}  // namespace deepcomm::cpu
