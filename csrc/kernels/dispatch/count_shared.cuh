// SPDX-License-Identifier: Apache-2.0
// dispatch_count: its shared memory and what all steps of a block share.
#pragma once

#include "kernels/dispatch/walk.cuh"
#include "kernels/meet/meet.cuh"
#include "layout/plan.hpp"

namespace deepcomm::kernels {

constexpr int32_t kCountWarps = 16;
constexpr int32_t kWalkWarps = 8;        ///< of them: more would each have their own counters
constexpr int32_t kMaxCountBlocks = 16;  ///< more would only wait for each other
constexpr int32_t kWordsAtOnce = 8;
constexpr int32_t kNoLimit = 0x7FFFFFFF;

template <int32_t kNumRanks, int32_t kNumExperts, int32_t kNumOrigins>
struct CountShared {
    static constexpr int32_t kNumTotals = kNumRanks + kNumExperts;
    static constexpr int32_t kNumCounters = kNumOrigins * kNumTotals;

    MeetTable<kNumRanks> meet;
    int32_t tokens_from[kNumOrigins + 1];  ///< first token of each origin, and the end
    /// Of each origin [R] tokens for each rank, then [E] pairs for each expert: of each warp; later
    /// the next slot.
    uint32_t counters[kWalkWarps][kNumCounters];
    uint32_t masks[kWalkWarps][kNumCounters];        ///< tokens of each warp's batch: walk.cuh
    uint32_t firsts[kWalkWarps][device::kWarpSize];  ///< WalkedToken::firsts
    uint32_t
        tokens[kNumOrigins * kNumRanks * kNumRanks];  ///< of each block (origin, source), by rank
    uint32_t before[kNumCounters];  ///< of blocks, then also of sources, that come first
    uint32_t own[kNumCounters];     ///< of this rank
    uint32_t totals[kNumTotals];    ///< of all ranks and origins
    int32_t offsets[kNumExperts];   ///< first row of each expert at its rank
    int32_t num_slots[kNumRanks];   ///< rows of an expert layout at each rank
    uint32_t refusal;
};

/// Everything that the steps of one block share.
template <int32_t kNumRanks, int32_t kNumExperts, int32_t kNumOrigins>
struct CountBlock {
    static constexpr int32_t kNumLocal = kNumExperts / kNumRanks;
    static constexpr int32_t kNumTotals = kNumRanks + kNumExperts;
    static constexpr int32_t kNumCounters = kNumOrigins * kNumTotals;
    static constexpr int32_t kNumPartials = kNumCounters + 1;  ///< and the refusal

    const CountParams& params;
    CountShared<kNumRanks, kNumExperts, kNumOrigins>& smem;
    device::Block block;
    uint32_t epoch;

    DEEPCOMM_DEVICE int32_t num_tokens() const {
        return kNumOrigins == 1 ? params.num_tokens : smem.tokens_from[kNumOrigins];
    }

    DEEPCOMM_DEVICE bool walks() const { return device::Warp{}.warp_idx() < kWalkWarps; }
    DEEPCOMM_DEVICE uint32_t* counters() const { return smem.counters[device::Warp{}.warp_idx()]; }
    DEEPCOMM_DEVICE uint32_t* masks() const { return smem.masks[device::Warp{}.warp_idx()]; }
    /// Of a token of the batch that is marked: its lane is the bit.
    DEEPCOMM_DEVICE int32_t slot_of(int32_t counter, int32_t token_lane) const {
        const uint32_t before = masks()[counter] & ((1u << token_lane) - 1);
        return static_cast<int32_t>(counters()[counter]) + device::popcount(before);
    }

    DEEPCOMM_DEVICE Walk walk(int32_t warp_idx) const {
        const auto num_tokens = static_cast<int64_t>(this->num_tokens());
        const int32_t num_parts = block.num_blocks() * kWalkWarps;
        const int32_t part = block.block_idx() * kWalkWarps + warp_idx;
        return {params.topk_idx,
                params.ids_are_64,
                params.num_topk,
                kNumExperts,
                kNumLocal,
                params.recv_layout == RecvLayout::kToken,
                kNumOrigins,
                smem.tokens_from,
                static_cast<int32_t>(num_tokens * part / num_parts),
                static_cast<int32_t>(num_tokens * (part + 1) / num_parts)};
    }

    /// Whether what goes to a rank is written to its mirror.
    DEEPCOMM_DEVICE bool is_mirror(int32_t dst) const {
        return params.meet.is_carried && dst != params.meet.comm.rank;
    }
    DEEPCOMM_DEVICE device::WaitSite site(device::Role role, int32_t peer) const {
        return {device::Operation::kDispatch, role, peer};
    }

    /// Counter i of an origin.
    DEEPCOMM_DEVICE int32_t counter(int32_t origin, int32_t i) const {
        return origin * kNumTotals + i;
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
