// SPDX-License-Identifier: Apache-2.0
// The FP8 cast of a row in shared memory, by one warp, in place: half a warp a tile of 128
// channels, 8 channels a lane. What is read is ahead of what is written, but for the first step.
#pragma once

#include "device/device.cuh"

namespace deepcomm::kernels {

constexpr int32_t kChannelsPerLane = 8;
constexpr int32_t kLanesPerTile = kScaleTile / kChannelsPerLane;
constexpr int32_t kTilesPerStep = device::kWarpSize / kLanesPerTile;
constexpr int32_t kCastUnroll = 4;  ///< steps whose loads are in flight together

/// Largest magnitude of eight BF16 and then of the tile's lanes, as FP32 bits.
DEEPCOMM_DEVICE uint32_t tile_amax(const device::Vec128& values) {
    uint32_t largest = device::kAmaxFloorBits;
    for (int32_t i = 0; i < 4; ++i) {
        const uint32_t low = values.words[i] << 16 & ~kSignBit;
        const uint32_t high = values.words[i] & 0xFFFF0000u & ~kSignBit;
        largest = low > largest ? low : largest;
        largest = high > largest ? high : largest;
    }
    for (int32_t distance = kLanesPerTile / 2; distance > 0; distance /= 2) {
        const uint32_t other = device::warp_shuffle_xor(largest, distance);
        largest = other > largest ? other : largest;
    }
    return largest;
}

struct Fp8x8 {
    uint32_t low, high;
};

DEEPCOMM_DEVICE Fp8x8 cast_eight(const device::Vec128& values, float inverse) {
    uint32_t halves[4];
    for (int32_t i = 0; i < 4; ++i) {
        halves[i] = device::e4m3x2_from_floats(
            device::fmul_rn(device::bf16x2_low(values.words[i]), inverse),
            device::fmul_rn(device::bf16x2_high(values.words[i]), inverse));
    }
    return {halves[0] | halves[1] << 16, halves[2] | halves[3] << 16};
}

/// Casts the BF16 row at `row` in place; its scales go to `scales`: FP32, or bytes of UE8M0 whose
/// last word is filled with zeros.
template <int32_t kHidden>
DEEPCOMM_DEVICE void cast_row(unsigned char* row, unsigned char* scales, bool is_ue8m0) {
    constexpr int32_t kNumTiles = (kHidden + kScaleTile - 1) / kScaleTile;
    constexpr int32_t kNumSteps = (kNumTiles + kTilesPerStep - 1) / kTilesPerStep;
    const device::Warp warp;
    const int32_t lane = warp.thread_idx();
    const int32_t half = lane / kLanesPerTile;
    for (int32_t begin = 0; begin < kNumSteps; begin += kCastUnroll) {
        device::Vec128 values[kCastUnroll];
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kCastUnroll; ++i) {
            const int32_t channel = ((begin + i) * device::kWarpSize + lane) * kChannelsPerLane;
            values[i] = channel < kHidden
                            ? *reinterpret_cast<const device::Vec128*>(row + 2 * channel)
                            : device::Vec128{};
        }
        warp.sync();  // ORDER: what is read before what is written over it
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kCastUnroll; ++i) {
            const int32_t step = begin + i;
            const int32_t channel = (step * device::kWarpSize + lane) * kChannelsPerLane;
            const int32_t tile = step * kTilesPerStep + half;
            const uint32_t amax = tile_amax(values[i]);
            const device::TileScale scale =
                is_ue8m0 ? device::ue8m0_tile_scale(amax) : device::fp32_tile_scale(amax);
            if (channel < kHidden) {
                *reinterpret_cast<Fp8x8*>(row + channel) = cast_eight(values[i], scale.inverse);
            }
            if (lane % kLanesPerTile != 0) continue;
            if (!is_ue8m0) {
                if (tile < kNumTiles) reinterpret_cast<uint32_t*>(scales)[tile] = scale.stored;
            } else if (tile < round_up(kNumTiles, 4)) {
                scales[tile] = tile < kNumTiles ? static_cast<unsigned char>(scale.stored) : 0;
            }
        }
    }
    // Bytes of the last word that no step has come to.
    const int32_t rest = static_cast<int32_t>(round_up(kNumSteps, kCastUnroll)) * kTilesPerStep;
    if (is_ue8m0 && rest + lane < round_up(kNumTiles, 4)) scales[rest + lane] = 0;
}

}  // namespace deepcomm::kernels
