// SPDX-License-Identifier: Apache-2.0
// The FP8 cast of a row in shared memory, by one warp, in place: half a warp a tile of 128
// channels, 8 channels a lane. Casts are bound by the instructions that they take, so what is a
// tile's is done once for all tiles of a round, a lane a tile. PROTOCOLS.md: rows, casts.
#pragma once

#include "device/device.cuh"

namespace deepcomm::kernels {

constexpr int32_t kChannelsPerLane = 8;
constexpr int32_t kLanesPerTile = kScaleTile / kChannelsPerLane;
constexpr int32_t kTilesPerStep = device::kWarpSize / kLanesPerTile;
constexpr int32_t kMostCastSteps = 8;  ///< of a round: two lanes of a half for each tile
constexpr uint32_t kMagnitudesOfBf16x2 = 0x7FFF7FFFu;

/// Steps of a warp over a row: 256 channels, two tiles each. In rounds, whose loads are in flight
/// together, and which are equally long, so that none is half empty.
template <int32_t kHidden>
struct CastSteps {
    static constexpr int32_t kNumTiles = (kHidden + kScaleTile - 1) / kScaleTile;
    static constexpr int32_t kNumSteps = (kNumTiles + kTilesPerStep - 1) / kTilesPerStep;
    static constexpr int32_t kNumRounds = (kNumSteps + kMostCastSteps - 1) / kMostCastSteps;
    static constexpr int32_t kInRound = (kNumSteps + kNumRounds - 1) / kNumRounds;
    static constexpr int32_t kTilesOfRounds = kNumRounds * kInRound * kTilesPerStep;
    static constexpr bool kIsWhole = kTilesOfRounds * kScaleTile == kHidden;
};

/// Largest magnitudes of four BF16 in low halves and of four in high halves: as integers such
/// bits are ordered like the magnitudes.
DEEPCOMM_DEVICE uint32_t lane_amax(const device::Vec128& values) {
    uint32_t largest = values.words[0] & kMagnitudesOfBf16x2;
    for (int32_t i = 1; i < 4; ++i) {
        largest = device::max_u16x2(largest, values.words[i] & kMagnitudesOfBf16x2);
    }
    return largest;
}

/// The larger of a pair of BF16 magnitudes, at least the floor, as FP32 bits.
DEEPCOMM_DEVICE uint32_t amax_of_pair(uint32_t pair) {
    const uint32_t low = pair << 16, high = pair & ~0xFFFFu;
    const uint32_t amax = low > high ? low : high;
    return amax > device::kAmaxFloorBits ? amax : device::kAmaxFloorBits;
}

/// Largest magnitude of one tile, as FP32 bits; all its lanes.
DEEPCOMM_DEVICE uint32_t tile_amax(const device::Vec128& values) {
    uint32_t largest = lane_amax(values);
    for (int32_t distance = kLanesPerTile / 2; distance > 0; distance /= 2) {
        largest = device::max_u16x2(largest, device::warp_shuffle_xor(largest, distance));
    }
    return amax_of_pair(largest);
}

/// Which step's tile a lane sees to: of each pair of lanes one, the tile of its half of the warp.
DEEPCOMM_DEVICE int32_t step_of_lane(int32_t lane) { return lane % kLanesPerTile / 2; }

/// Of a lane's half of the warp, the first of the lanes that see to a step's tile.
DEEPCOMM_DEVICE int32_t lane_of_step(int32_t lane, int32_t step) {
    return lane / kLanesPerTile * kLanesPerTile + 2 * step;
}

/// Of a round, the largest magnitude of the tile that the lane sees to. Lanes give away half of the
/// steps that they still have for the other half, so that 8 exchanges do for 8 steps instead of 32.
template <int32_t kSteps>
DEEPCOMM_DEVICE uint32_t round_amax(const device::Vec128 (&values)[kSteps]) {
    const int32_t lane = device::Warp{}.thread_idx();
    uint32_t largest[kMostCastSteps];
    DEEPCOMM_UNROLL
    for (int32_t i = 0; i < kMostCastSteps; ++i) {
        largest[i] = i < kSteps ? lane_amax(values[i % kSteps]) : 0;
    }
    DEEPCOMM_UNROLL
    for (int32_t num_kept = kMostCastSteps / 2; num_kept > 0; num_kept /= 2) {
        const int32_t distance = 2 * num_kept;
        const bool keeps_upper = (lane & distance) != 0;
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < num_kept; ++i) {
            const uint32_t upper = largest[i + num_kept];
            const uint32_t given = keeps_upper ? largest[i] : upper;
            largest[i] = device::max_u16x2(keeps_upper ? upper : largest[i],
                                           device::warp_shuffle_xor(given, distance));
        }
    }
    return amax_of_pair(device::max_u16x2(largest[0], device::warp_shuffle_xor(largest[0], 1)));
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

/// Stores the scale of the lane's tile: FP32, or a byte of UE8M0, zero after the last tile of a
/// word that has fewer.
template <int32_t kNumTiles>
DEEPCOMM_DEVICE void store_scale(unsigned char* scales, int32_t tile, uint32_t stored,
                                 bool is_ue8m0) {
    if (!is_ue8m0) {
        if (tile < kNumTiles) reinterpret_cast<uint32_t*>(scales)[tile] = stored;
    } else if (tile < round_up(kNumTiles, 4)) {
        scales[tile] = tile < kNumTiles ? static_cast<unsigned char>(stored) : 0;
    }
}

/// Casts the BF16 row at `row` in place; its scales go to `scales`: FP32, or bytes of UE8M0 whose
/// last word is filled with zeros. What is read is ahead of what is written, but for the first round.
template <int32_t kHidden>
DEEPCOMM_DEVICE void cast_row(unsigned char* row, unsigned char* scales, bool is_ue8m0) {
    using Steps = CastSteps<kHidden>;
    const device::Warp warp;
    const int32_t lane = warp.thread_idx();
    for (int32_t begin = 0; begin < Steps::kNumRounds * Steps::kInRound; begin += Steps::kInRound) {
        const int32_t first = (begin * device::kWarpSize + lane) * kChannelsPerLane;
        const auto channel = [&](int32_t i) {
            return first + i * device::kWarpSize * kChannelsPerLane;
        };
        device::Vec128 values[Steps::kInRound];
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < Steps::kInRound; ++i) {
            values[i] = device::Vec128{};
            if (!Steps::kIsWhole && channel(i) >= kHidden) continue;
            values[i] = *reinterpret_cast<const device::Vec128*>(row + 2 * channel(i));
        }
        warp.sync();  // ORDER: what is read before what is written over it
        const uint32_t amax = round_amax(values);
        const device::TileScale scale =
            is_ue8m0 ? device::ue8m0_tile_scale(amax) : device::fp32_tile_scale(amax);
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < Steps::kInRound; ++i) {
            const float inverse = device::warp_shuffle(scale.inverse, lane_of_step(lane, i));
            if (!Steps::kIsWhole && channel(i) >= kHidden) continue;
            *reinterpret_cast<Fp8x8*>(row + channel(i)) = cast_eight(values[i], inverse);
        }
        const int32_t step = step_of_lane(lane);
        if (step >= Steps::kInRound || lane % 2 != 0) continue;
        const int32_t tile = (begin + step) * kTilesPerStep + lane / kLanesPerTile;
        store_scale<Steps::kNumTiles>(scales, tile, scale.stored, is_ue8m0);
    }
    // Bytes of the last word that no round has come to.
    const int32_t rest = Steps::kTilesOfRounds + lane;
    if (is_ue8m0 && rest < round_up(Steps::kNumTiles, 4)) scales[rest] = 0;
}

}  // namespace deepcomm::kernels
