// SPDX-License-Identifier: Apache-2.0
// Emulated counterpart of cuda/collective.cuh.
#pragma once

#include "device/emu/platform.cuh"

namespace deepcomm::device {

constexpr uint32_t kFullMask = 0xFFFFFFFFu;

inline void block_barrier() { (void)emu::block_barrier(true); }

inline bool block_barrier_and(bool flag) { return emu::block_barrier(flag); }

inline void named_barrier(int32_t barrier_idx, int32_t num_threads) {
    (void)emu::named_barrier(barrier_idx, num_threads, true);
}

inline bool named_barrier_and(int32_t barrier_idx, int32_t num_threads, bool flag) {
    return emu::named_barrier(barrier_idx, num_threads, flag);
}

inline void warp_sync(uint32_t mask = kFullMask) {
    (void)emu::warp_collective(emu::Collective::kSync, mask, 0, 0);
}

inline uint32_t warp_ballot(bool flag, uint32_t mask = kFullMask) {
    return static_cast<uint32_t>(
        emu::warp_collective(emu::Collective::kBallot, mask, flag ? 1 : 0, 0));
}

namespace emulated {

/// Moves any value of up to 8 bytes through a collective.
template <typename T>
inline T shuffle(emu::Collective kind, T value, int32_t argument, uint32_t mask) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
    union {
        uint64_t bits;
        T value;
    } carrier = {0};
    carrier.value = value;
    carrier.bits = emu::warp_collective(kind, mask, carrier.bits, static_cast<uint32_t>(argument));
    return carrier.value;
}

}  // namespace emulated

template <typename T>
inline T warp_shuffle(T value, int32_t src_lane, uint32_t mask = kFullMask) {
    return emulated::shuffle(emu::Collective::kShuffle, value, src_lane, mask);
}

template <typename T>
inline T warp_shuffle_xor(T value, int32_t lane_mask, uint32_t mask = kFullMask) {
    return emulated::shuffle(emu::Collective::kShuffleXor, value, lane_mask, mask);
}

template <typename T>
inline T warp_shuffle_up(T value, int32_t distance, uint32_t mask = kFullMask) {
    return emulated::shuffle(emu::Collective::kShuffleUp, value, distance, mask);
}

template <typename T>
inline T warp_shuffle_down(T value, int32_t distance, uint32_t mask = kFullMask) {
    return emulated::shuffle(emu::Collective::kShuffleDown, value, distance, mask);
}

inline uint32_t warp_match(uint32_t value, uint32_t mask = kFullMask) {
    return static_cast<uint32_t>(emu::warp_collective(emu::Collective::kMatch, mask, value, 0));
}

template <typename T>
inline T warp_sum(T value) {
    for (int32_t distance = 16; distance > 0; distance /= 2) {
        value += warp_shuffle_xor(value, distance);
    }
    return value;
}

inline uint32_t warp_or(uint32_t bits) {
    for (int32_t distance = 16; distance > 0; distance /= 2) {
        bits |= warp_shuffle_xor(bits, distance);
    }
    return bits;
}

inline int32_t popcount(uint32_t bits) { return __builtin_popcount(bits); }

inline int32_t lowest_bit(uint32_t bits) { return __builtin_ctz(bits); }

}  // namespace deepcomm::device
