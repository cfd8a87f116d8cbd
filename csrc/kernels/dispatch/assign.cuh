// SPDX-License-Identifier: Apache-2.0
// Role count: from counts to slots. Groups of experts are placed, then every pair gets its row, in the
// order of the walk. PROTOCOLS.md: dispatch_count.
#pragma once

#include "kernels/dispatch/count_shared.cuh"

namespace deepcomm::kernels {

/// A warp a rank: where the groups of its experts begin.
template <int32_t kNumRanks, int32_t kNumExperts, int32_t kNumOrigins>
DEEPCOMM_DEVICE void place_groups(const CountBlock<kNumRanks, kNumExperts, kNumOrigins>& my) {
    const device::Warp warp;
    const int32_t lane = warp.thread_idx();
    const bool is_padded = my.params.recv_layout == RecvLayout::kExpertPadded;
    const auto alignment = static_cast<uint32_t>(my.params.meet.header.alignment);
    const int32_t block_rows = kNumRanks * my.params.meet.max_tokens;
    DEEPCOMM_NO_UNROLL
    for (int32_t rank = warp.warp_idx(); rank < kNumRanks; rank += kCountWarps) {
        int32_t begin = 0;
        DEEPCOMM_NO_UNROLL
        for (int32_t first = 0; first < my.kNumLocal; first += device::kWarpSize) {
            const int32_t local = first + lane;
            const int32_t expert = rank * my.kNumLocal + local;
            uint32_t rows = local < my.kNumLocal ? my.smem.totals[kNumRanks + expert] : 0;
            rows = (rows + alignment - 1) / alignment * alignment;
            auto end = static_cast<int32_t>(rows);
            DEEPCOMM_NO_UNROLL
            for (int32_t distance = 1; distance < device::kWarpSize; distance *= 2) {
                const int32_t other = device::warp_shuffle_up(end, distance);
                if (lane >= distance) end += other;
            }
            if (local < my.kNumLocal) {
                my.smem.offsets[expert] =
                    is_padded ? local * block_rows : begin + end - static_cast<int32_t>(rows);
            }
            begin += device::warp_shuffle(end, device::kWarpSize - 1);
        }
        if (lane == 0) my.smem.num_slots[rank] = is_padded ? my.kNumLocal * block_rows : begin;
    }
    my.block.sync();  // ORDER: the offsets before they are read
}

/// Turns the warps' counters into the next slot of each.
template <int32_t kNumRanks, int32_t kNumExperts, int32_t kNumOrigins>
DEEPCOMM_DEVICE void start_slots(const CountBlock<kNumRanks, kNumExperts, kNumOrigins>& my) {
    for (int32_t i = my.block.thread_idx(); i < my.kNumCounters; i += my.block.size()) {
        uint32_t next = my.smem.before[i];
        const int32_t expert = i % my.kNumTotals - kNumRanks;
        if (expert >= 0) next += static_cast<uint32_t>(my.smem.offsets[expert]);
        DEEPCOMM_NO_UNROLL
        for (int32_t w = 0; w < kWalkWarps; ++w) {
            const uint32_t count = my.smem.counters[w][i];
            my.smem.counters[w][i] = next;
            next += count;
        }
    }
    my.block.sync();  // ORDER: the first slots before the warps' walks
}

DEEPCOMM_DEVICE int32_t limit_of(const Header& header) {
    return header.capacity == kNoCapacity ? kNoLimit : header.capacity;
}

/// Where a lane's pairs are in a batch, of which it takes lane, lane + 32, ...: tokens in turn, and k
/// in a token.
struct PairPlaces {
    int32_t token_lanes[kIdsAtOnce];
    uint32_t firsts = 0;  ///< bit i: pair i is its token's first for its rank
};

/// All lanes, from a token's lane and k on, which move on.
DEEPCOMM_DEVICE PairPlaces find_places(int32_t num_topk, uint32_t firsts_of_lane,
                                       int32_t* token_lane, int32_t* k) {
    PairPlaces places;
    DEEPCOMM_UNROLL
    for (int32_t i = 0; i < kIdsAtOnce; ++i) {
        places.token_lanes[i] = *token_lane % device::kWarpSize;
        const uint32_t firsts = device::warp_shuffle(firsts_of_lane, places.token_lanes[i]);
        places.firsts |= (firsts >> *k & 1) << i;
        *k += device::kWarpSize % num_topk;
        *token_lane += device::kWarpSize / num_topk + (*k >= num_topk);
        if (*k >= num_topk) *k -= num_topk;
    }
    return places;
}

/// What is stored of a pair.
struct AssignedPair {
    int32_t expert;      ///< or -1, and then all are
    int32_t token_slot;  ///< or -1: not its token's first for its rank
    int32_t pair_slot;
    int32_t lost_from;  ///< its origin if it is lost, or -1
};

template <int32_t kNumRanks, int32_t kNumExperts, int32_t kNumOrigins>
DEEPCOMM_DEVICE AssignedPair assign_pair(const CountBlock<kNumRanks, kNumExperts, kNumOrigins>& my,
                                         const Pair& pair, int32_t token_lane, bool is_first) {
    // Without branches, so that the loads of several pairs fly together: any counter stands for none.
    const int32_t row = my.slot_of(pair.token_counter, token_lane);
    const int32_t of_expert = my.slot_of(pair.pair_counter, token_lane);
    const int32_t limit = limit_of(my.smem.meet.headers[pair.dst < 0 ? 0 : pair.dst]);
    const bool is_there = pair.expert >= 0;
    const int32_t slot = my.params.recv_layout == RecvLayout::kToken ? row : of_expert;
    return {pair.expert, is_there && is_first ? row : -1, is_there ? slot : -1,
            is_there && slot >= limit ? pair.pair_counter / my.kNumTotals : -1};
}

template <int32_t kNumRanks, int32_t kNumExperts, int32_t kNumOrigins>
DEEPCOMM_DEVICE void store_pair(const CountBlock<kNumRanks, kNumExperts, kNumOrigins>& my,
                                int64_t index, const AssignedPair& assigned) {
    const RoutingTable& table = my.params.table;
    table.topk_idx[index] = assigned.expert;
    table.token_slot[index] = assigned.token_slot;
    if (my.params.recv_layout != RecvLayout::kToken) table.pair_slot[index] = assigned.pair_slot;
    if (assigned.lost_from < 0) return;
    uint32_t* lost = kNumOrigins > 1 ? my.params.lost : my.params.overflow;
    device::atom_or_relaxed_gpu(lost + assigned.lost_from, 1u);
}

/// The slots of a batch that is marked, a lane a pair, so that ids are loaded and slots stored in a
/// row; firsts are those of the lane's token.
template <int32_t kNumRanks, int32_t kNumExperts, int32_t kNumOrigins>
DEEPCOMM_DEVICE void assign_batch(const CountBlock<kNumRanks, kNumExperts, kNumOrigins>& my,
                                  const Walk& walk, int32_t first_token, uint32_t firsts) {
    const int32_t lane = device::Warp{}.thread_idx(), left = walk.end - first_token;
    const int32_t count = (left < device::kWarpSize ? left : device::kWarpSize) * walk.num_topk;
    const int64_t first = static_cast<int64_t>(first_token) * walk.num_topk;
    int32_t token_lane = lane / walk.num_topk, k = lane % walk.num_topk;
    DEEPCOMM_NO_UNROLL
    for (int32_t begin = 0; begin < count; begin += kIdsAtOnce * device::kWarpSize) {
        int64_t ids[kIdsAtOnce];
        walk.load_every<device::kWarpSize>(first + begin + lane, count - begin - lane, ids);
        const PairPlaces places = find_places(walk.num_topk, firsts, &token_lane, &k);
        AssignedPair assigned[kIdsAtOnce];
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kIdsAtOnce; ++i) {
            const int32_t counters = walk.counters_of(first_token + places.token_lanes[i]);
            assigned[i] = assign_pair(my, walk.name(counters, ids[i]), places.token_lanes[i],
                                      (places.firsts >> i & 1) != 0);
        }
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kIdsAtOnce; ++i) {
            const int32_t at = begin + i * device::kWarpSize + lane;
            if (at < count) store_pair(my, first + at, assigned[i]);
        }
    }
}

/// Goes through the batches again and writes every pair's slot.
template <int32_t kNumRanks, int32_t kNumExperts, int32_t kNumOrigins>
DEEPCOMM_DEVICE void assign_slots(const CountBlock<kNumRanks, kNumExperts, kNumOrigins>& my) {
    const device::Warp warp;
    if (!my.walks()) return;
    const Walk walk = my.walk(warp.warp_idx());
    if (walk.begin == walk.end) return;
    if (walk.end - walk.begin <= warp.size()) {  // the masks of the only batch are still there
        assign_batch(my, walk, walk.begin, my.smem.firsts[warp.warp_idx()][warp.thread_idx()]);
        return;
    }
    DEEPCOMM_NO_UNROLL
    for (int32_t first = walk.begin; first < walk.end; first += warp.size()) {
        const WalkedToken walked = walk.mark(first, my.masks(), my.kNumCounters);
        assign_batch(my, walk, first, walked.firsts);
        warp.sync();  // ORDER: the counters are read before they move on
        add_marks(my.masks(), my.counters(), my.kNumCounters);
    }
}

}  // namespace deepcomm::kernels
