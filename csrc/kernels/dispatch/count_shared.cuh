// SPDX-License-Identifier: Apache-2.0
// dispatch_count: its shared memory and what all steps of a block share.
#pragma once

#include "kernels/dispatch/walk.cuh"
#include "kernels/meet/meet.cuh"
#include "layout/plan.hpp"

namespace deepcomm::kernels {

constexpr int32_t kCountWarps = 16;
constexpr int32_t kMaxCountBlocks = 16;  ///< more would only wait for each other
constexpr int32_t kWordsAtOnce = 8;
constexpr int32_t kNoLimit = 0x7FFFFFFF;

template <int32_t kNumRanks, int32_t kNumExperts>
struct CountShared {
    static constexpr int32_t kNumCounters = kNumRanks + kNumExperts;

    MeetTable<kNumRanks> meet;
    /// [R] tokens for each rank, then [E] pairs for each expert: of each warp; later the next slot.
    uint32_t counters[kCountWarps][kNumCounters];
    uint32_t before[kNumCounters];  ///< of blocks, then also of ranks, that come first
    uint32_t totals[kNumCounters];  ///< of all ranks
    int32_t offsets[kNumExperts];   ///< first row of each expert at its rank
    int32_t num_slots[kNumRanks];   ///< rows of an expert layout at each rank
    uint32_t refusal;
};

/// Everything that the steps of one block share.
template <int32_t kNumRanks, int32_t kNumExperts>
struct CountBlock {
    static constexpr int32_t kNumLocal = kNumExperts / kNumRanks;
    static constexpr int32_t kNumCounters = kNumRanks + kNumExperts;
    static constexpr int32_t kNumPartials = kNumCounters + 1;  ///< and the refusal

    const CountParams& params;
    CountShared<kNumRanks, kNumExperts>& smem;
    device::Block block;
    uint32_t epoch;

    DEEPCOMM_DEVICE Walk walk(int32_t warp_idx) const {
        const auto num_tokens = static_cast<int64_t>(params.num_tokens);
        const int32_t num_parts = block.num_blocks() * kCountWarps;
        const int32_t part = block.block_idx() * kCountWarps + warp_idx;
        return {params.topk_idx,
                params.ids_are_64,
                params.num_topk,
                kNumExperts,
                kNumLocal,
                static_cast<int32_t>(num_tokens * part / num_parts),
                static_cast<int32_t>(num_tokens * (part + 1) / num_parts)};
    }

    DEEPCOMM_DEVICE device::WaitSite site(device::Role role, int32_t peer) const {
        return {device::Operation::kDispatch, role, peer};
    }

    DEEPCOMM_DEVICE uint64_t* partial(int32_t block_idx, int32_t counter) const {
        return params.partials + static_cast<int64_t>(block_idx) * kNumPartials + counter;
    }
    DEEPCOMM_DEVICE uint64_t tagged(uint32_t value) const {
        return static_cast<uint64_t>(epoch) << 32 | value;
    }
    DEEPCOMM_DEVICE int32_t* plan(int32_t word) const { return params.table.plan + word; }
};

}  // namespace deepcomm::kernels
