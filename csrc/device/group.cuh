// SPDX-License-Identifier: Apache-2.0
// Who acts: groups of threads as values. Every group has thread_idx() inside itself, size(),
// is_leader(), sync() and sync_and(flag), so that loops and protocols take it as an argument.
#pragma once

#include "device/primitives.cuh"

namespace deepcomm::device {

constexpr int32_t kWarpSize = 32;

/// The calling thread alone.
struct Thread {
    DEEPCOMM_DEVICE int32_t thread_idx() const { return 0; }
    DEEPCOMM_DEVICE int32_t size() const { return 1; }
    DEEPCOMM_DEVICE bool is_leader() const { return true; }
    DEEPCOMM_DEVICE void sync() const {}
    DEEPCOMM_DEVICE bool sync_and(bool flag) const { return flag; }
};

/// The calling warp, all 32 lanes.
struct Warp {
    DEEPCOMM_DEVICE int32_t thread_idx() const {
        return static_cast<int32_t>(threadIdx.x) % kWarpSize;
    }
    DEEPCOMM_DEVICE int32_t size() const { return kWarpSize; }
    DEEPCOMM_DEVICE bool is_leader() const { return thread_idx() == 0; }
    DEEPCOMM_DEVICE int32_t warp_idx() const {
        return static_cast<int32_t>(threadIdx.x) / kWarpSize;
    }
    DEEPCOMM_DEVICE void sync() const { warp_sync(); }
    DEEPCOMM_DEVICE bool sync_and(bool flag) const {
        const uint32_t ballot = warp_ballot(flag);
        warp_sync();  // ORDER: the lanes' accesses before it; a ballot alone orders no memory
        return ballot == kFullMask;
    }
};

/// Warps [first_warp, first_warp + num_warps) of the block, which meet at a named barrier.
struct WarpRange {
    int32_t first_warp;
    int32_t num_warps;
    int32_t barrier_idx;  ///< 1..15, not used by another group at the same time

    DEEPCOMM_DEVICE int32_t thread_idx() const {
        return static_cast<int32_t>(threadIdx.x) - first_warp * kWarpSize;
    }
    DEEPCOMM_DEVICE int32_t size() const { return num_warps * kWarpSize; }
    DEEPCOMM_DEVICE bool is_leader() const { return thread_idx() == 0; }
    DEEPCOMM_DEVICE bool contains_me() const { return thread_idx() >= 0 && thread_idx() < size(); }
    DEEPCOMM_DEVICE void sync() const { named_barrier(barrier_idx, size()); }
    DEEPCOMM_DEVICE bool sync_and(bool flag) const {
        return named_barrier_and(barrier_idx, size(), flag);
    }
};

/// The calling block.
struct Block {
    DEEPCOMM_DEVICE int32_t thread_idx() const { return static_cast<int32_t>(threadIdx.x); }
    DEEPCOMM_DEVICE int32_t size() const { return static_cast<int32_t>(blockDim.x); }
    DEEPCOMM_DEVICE bool is_leader() const { return thread_idx() == 0; }
    DEEPCOMM_DEVICE int32_t block_idx() const { return static_cast<int32_t>(blockIdx.x); }
    DEEPCOMM_DEVICE int32_t num_blocks() const { return static_cast<int32_t>(gridDim.x); }
    DEEPCOMM_DEVICE void sync() const { block_barrier(); }
    DEEPCOMM_DEVICE bool sync_and(bool flag) const { return block_barrier_and(flag); }
};

}  // namespace deepcomm::device
