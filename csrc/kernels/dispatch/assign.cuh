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
    for (int32_t rank = warp.warp_idx(); rank < kNumRanks; rank += kCountWarps) {
        int32_t begin = 0;
        for (int32_t first = 0; first < my.kNumLocal; first += device::kWarpSize) {
            const int32_t local = first + lane;
            const int32_t expert = rank * my.kNumLocal + local;
            uint32_t rows = local < my.kNumLocal ? my.smem.totals[kNumRanks + expert] : 0;
            rows = (rows + alignment - 1) / alignment * alignment;
            auto end = static_cast<int32_t>(rows);
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

/// A token's row of a table, written four at a time where rows are whole vectors: a lane's rows are
/// far apart, so that each store takes long.
struct IdRow {
    int32_t* row;
    bool has_vectors;
    device::Vec128 vector{};

    DEEPCOMM_DEVICE IdRow(int32_t* to, int32_t num_topk)
        : row(to), has_vectors(num_topk % 4 == 0) {}

    /// In ascending order of k, known to the compiler modulo 4.
    DEEPCOMM_DEVICE void put(int32_t k, int32_t value) {
        if (!has_vectors) {
            row[k] = value;
            return;
        }
        vector.words[k % 4] = static_cast<uint32_t>(value);
        if (k % 4 == 3) *reinterpret_cast<device::Vec128*>(row + k - 3) = vector;
    }
};

/// The slots of a lane's token.
template <int32_t kNumRanks, int32_t kNumExperts, int32_t kNumOrigins>
DEEPCOMM_DEVICE void assign_token(const CountBlock<kNumRanks, kNumExperts, kNumOrigins>& my,
                                  const Walk& walk, const WalkedToken& walked) {
    const RoutingTable& table = my.params.table;
    const bool by_expert = my.params.recv_layout != RecvLayout::kToken;
    uint32_t* lost = kNumOrigins > 1 ? my.params.lost : my.params.overflow;
    const int64_t first = static_cast<int64_t>(walked.token) * my.params.num_topk;
    IdRow experts(table.topk_idx + first, walk.num_topk);
    IdRow token_slots(table.token_slot + first, walk.num_topk);
    IdRow pair_slots(table.pair_slot + first, walk.num_topk);
    walk.for_each_pair(walked.token, [&](int32_t k, int64_t, const Pair& pair) {
        int32_t token_slot = -1, pair_slot = -1;
        if (pair.expert >= 0) {
            const int32_t row = my.next_slot(pair.token_counter);
            if ((walked.firsts >> k & 1) != 0) token_slot = row;
            pair_slot = by_expert ? my.next_slot(pair.pair_counter) : row;
            if (pair_slot >= limit_of(my.smem.meet.headers[pair.dst])) {
                device::atom_or_relaxed_gpu(lost + pair.pair_counter / my.kNumTotals, 1u);
            }
        }
        experts.put(k, pair.expert);
        token_slots.put(k, token_slot);
        if (by_expert) pair_slots.put(k, pair_slot);
    });
}

/// Walks again and writes every pair's slot.
template <int32_t kNumRanks, int32_t kNumExperts, int32_t kNumOrigins>
DEEPCOMM_DEVICE void assign_slots(const CountBlock<kNumRanks, kNumExperts, kNumOrigins>& my) {
    const device::Warp warp;
    if (!my.walks()) return;
    const Walk walk = my.walk(warp.warp_idx());
    // The masks of a walk's only batch are still there.
    const bool is_marked = walk.end - walk.begin <= warp.size();
    for (int32_t first = walk.begin; first < walk.end; first += warp.size()) {
        const WalkedToken walked =
            is_marked ? WalkedToken{walk.token_of(first),
                                    my.smem.firsts[warp.warp_idx()][warp.thread_idx()], 0}
                      : walk.mark(first, my.masks(), my.kNumCounters);
        if (walked.token >= 0) assign_token(my, walk, walked);
        warp.sync();  // ORDER: the counters are read before they move on
        add_marks(my.masks(), my.counters(), my.kNumCounters);
    }
}

}  // namespace deepcomm::kernels
