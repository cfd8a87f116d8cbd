// SPDX-License-Identifier: Apache-2.0
// Meetings inside a block and a warp. Barriers order memory; shuffles and ballots do not.
#pragma once

#include "device/cuda/platform.cuh"

namespace deepcomm::device {

constexpr uint32_t kFullMask = 0xFFFFFFFFu;

/// ORDER: accesses of all threads before it happen before those of all threads after it.
DEEPCOMM_DEVICE void block_barrier() { __syncthreads(); }

/// The same; returns whether the flag was true in every thread.
DEEPCOMM_DEVICE bool block_barrier_and(bool flag) { return __syncthreads_and(flag) != 0; }

/// ORDER: the same for the num_threads (whole warps) that meet at this barrier; index 1..15.
DEEPCOMM_DEVICE void named_barrier(int32_t barrier_idx, int32_t num_threads) {
    asm volatile("barrier.sync %0, %1;" ::"r"(barrier_idx), "r"(num_threads) : "memory");
}

DEEPCOMM_DEVICE bool named_barrier_and(int32_t barrier_idx, int32_t num_threads, bool flag) {
    int32_t result;
    asm volatile(
        "{.reg .pred mine, all;\n"
        " setp.ne.s32 mine, %3, 0;\n"
        " barrier.red.and.pred all, %1, %2, mine;\n"
        " selp.s32 %0, 1, 0, all;}"
        : "=r"(result)
        : "r"(barrier_idx), "r"(num_threads), "r"(static_cast<int32_t>(flag))
        : "memory");
    return result != 0;
}

/// ORDER: accesses of the mask's lanes before it happen before theirs after it.
DEEPCOMM_DEVICE void warp_sync(uint32_t mask = kFullMask) { __syncwarp(mask); }

DEEPCOMM_DEVICE uint32_t warp_ballot(bool flag, uint32_t mask = kFullMask) {
    return __ballot_sync(mask, flag);
}

template <typename T>
DEEPCOMM_DEVICE T warp_shuffle(T value, int32_t src_lane, uint32_t mask = kFullMask) {
    return __shfl_sync(mask, value, src_lane);
}

template <typename T>
DEEPCOMM_DEVICE T warp_shuffle_xor(T value, int32_t lane_mask, uint32_t mask = kFullMask) {
    return __shfl_xor_sync(mask, value, lane_mask);
}

template <typename T>
DEEPCOMM_DEVICE T warp_shuffle_up(T value, int32_t distance, uint32_t mask = kFullMask) {
    return __shfl_up_sync(mask, value, distance);
}

template <typename T>
DEEPCOMM_DEVICE T warp_shuffle_down(T value, int32_t distance, uint32_t mask = kFullMask) {
    return __shfl_down_sync(mask, value, distance);
}

/// The mask's lanes whose value equals the caller's.
DEEPCOMM_DEVICE uint32_t warp_match(uint32_t value, uint32_t mask = kFullMask) {
    return __match_any_sync(mask, value);
}

/// Sum over the warp's lanes, of 32-bit integers.
template <typename T>
DEEPCOMM_DEVICE T warp_sum(T value) {
    return __reduce_add_sync(kFullMask, value);
}

/// Bits that any lane of the warp has.
DEEPCOMM_DEVICE uint32_t warp_or(uint32_t bits) { return __reduce_or_sync(kFullMask, bits); }

DEEPCOMM_DEVICE int32_t popcount(uint32_t bits) { return __popc(bits); }
/// Index of the lowest set bit; bits != 0.
DEEPCOMM_DEVICE int32_t lowest_bit(uint32_t bits) { return __ffs(static_cast<int>(bits)) - 1; }

}  // namespace deepcomm::device
