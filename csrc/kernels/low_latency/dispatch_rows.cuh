// SPDX-License-Identifier: Apache-2.0
// A row that a block delivers: its packets on their way, or the row itself where the block has kept it;
// where its copies go, and what is written and recorded beside them.
#pragma once

#include "kernels/low_latency/dispatch_outputs.cuh"

namespace deepcomm::kernels::low_latency {

/// Tokens with an expert here of the sources before this one, and of this one before token.
template <typename Shared>
DEEPCOMM_DEVICE int32_t token_slot(const LowLatencyParams& params, const device::Warp& warp,
                                   const Shared& shared, const Pair& pair) {
    const int32_t last = pair.source * params.map.token_words + pair.token / 32;
    return count_tokens_here(warp, shared, last, (1u << pair.token % 32) - 1u);
}

constexpr int32_t kSourcesAtOnce = 4;

/// Tokens of an expert from the sources before one.
template <typename Shared>
DEEPCOMM_DEVICE uint32_t count_before(const LowLatencyParams& params, const Shared& shared,
                                      int32_t source, int32_t expert) {
    const int32_t num_local = params.map.num_local_experts;
    uint32_t count = 0;
    DEEPCOMM_NO_UNROLL
    for (int32_t begin = 0; begin < source; begin += kSourcesAtOnce) {
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kSourcesAtOnce; ++i) {
            if (begin + i < source) count += shared.counts[(begin + i) * num_local + expert];
        }
    }
    return count;
}

/// The last warp: says by the head of a row where its copies go, by ascending expert. EXPERT_PADDED.
template <typename Shared>
DEEPCOMM_DEVICE void place_copies(const LowLatencyDispatchParams& params, const device::Warp& warp,
                                  const Pair& pair, const Vec128& head, Shared& shared) {
    const LowLatencyParams& base = params.base;
    const uint32_t expert = head.words[0];
    const bool is_here = expert != kNoExpert;
    int32_t order = 0;  // copies of smaller experts
    DEEPCOMM_NO_UNROLL
    for (int32_t begin = 0; begin < base.num_topk; begin += kColumnsAtOnce) {
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kColumnsAtOnce; ++i) {
            order += device::warp_shuffle(expert, begin + i) < expert ? 1 : 0;
        }
    }
    const int32_t num_copies = device::popcount(device::warp_ballot(is_here));
    if (warp.is_leader()) shared.num_copies = num_copies;
    if (!is_here) return;
    const auto local = static_cast<int32_t>(expert);
    const auto before =
        static_cast<int32_t>(count_before(base, shared, pair.source, local) + head.words[1]);
    shared.slots[order] = local * base.map.num_ranks * base.map.max_tokens + before;
    shared.scales_at[order] = local * params.scale_block_stride + before * params.scale_row_stride;
    shared.columns[order] = warp.thread_idx();
}

/// The last warp: writes what is beside the copies, and records them for combines; a lane a copy.
template <typename Shared>
DEEPCOMM_DEVICE void record_copies(const LowLatencyDispatchParams& params, const device::Warp& warp,
                                   const Pair& pair, const Vec128& head, const Shared& shared) {
    const LowLatencyParams& base = params.base;
    const int32_t lane = warp.thread_idx();
    const bool has_copy = lane < shared.num_copies;
    const int32_t column = has_copy ? shared.columns[lane] : lane;
    const uint32_t weight = device::warp_shuffle(head.words[2], column);
    if (lane >= base.num_topk) return;
    const int64_t index = pair.index(base) * base.num_topk + lane;
    int32_t entry = layout::kNoEntry;
    if (has_copy) {
        const int32_t slot = shared.slots[lane];
        entry = slot | column << layout::kEntrySlotBits;
        base.record[base.record_map.weights + index] = static_cast<int32_t>(weight);
        if (params.out_topk_weights != nullptr) {
            params.out_topk_weights[slot] = device::float_from_bits(weight);
        }
    }
    base.record[base.record_map.entries + index] = entry;
}

/// The same for TOKEN: one row.
template <typename Shared>
DEEPCOMM_DEVICE void place_token(const LowLatencyDispatchParams& params, const device::Warp& warp,
                                 const Pair& pair, Shared& shared) {
    const int32_t slot = token_slot(params.base, warp, shared, pair);
    if (!warp.is_leader()) return;
    shared.num_copies = 1;
    shared.slots[0] = slot;
    shared.scales_at[0] = slot * params.scale_row_stride;
}

/// With the experts and weights of the token.
template <typename Shared>
DEEPCOMM_DEVICE void record_token(const LowLatencyDispatchParams& params, const device::Warp& warp,
                                  const Pair& pair, const Vec128& head, const Shared& shared) {
    const LowLatencyParams& base = params.base;
    const int32_t k = warp.thread_idx(), slot = shared.slots[0];
    if (k >= base.num_topk) return;
    base.record[base.record_map.entries + pair.index(base) * base.num_topk + k] =
        k == 0 ? slot : layout::kNoEntry;
    const bool is_here = head.words[0] != kNoExpert;
    const int64_t index = static_cast<int64_t>(slot) * base.num_topk + k;
    store_id(params, index, is_here ? static_cast<int32_t>(head.words[0]) : -1);
    if (params.out_topk_weights == nullptr) return;
    params.out_topk_weights[index] = is_here ? device::float_from_bits(head.words[2]) : 0.0f;
}

/// A row's packets and its head, on their way to the threads that stage them; or the row that the block
/// has sent last, and kept as it is staged.
template <typename Shared>
struct RowPackets {
    using Spec = typename Shared::Spec;
    static constexpr int32_t kAll = Spec::kPacketsOfThread;
    static constexpr int32_t kCount = kAll < 6 ? kAll : 6;  ///< of a thread in flight

    Pair pair = {0, -1};  ///< none yet
    bool is_kept = false;
    PacketBatch<typename Spec::Format, kCount> payload;
    PacketBatch<Tagged, 1> head;  ///< in the last warp

    static DEEPCOMM_DEVICE PacketRange heads(const LowLatencyParams& params,
                                             const device::Block& block, const LowLatencyTurn& turn,
                                             const Pair& pair) {
        const int64_t offset = params.map.row_offset(turn.slot, pair.source, pair.token);
        return {packets_at(params.local, offset), device::kWarpSize,
                is_in_last_warp(block) ? params.num_topk : 0};
    }

    static DEEPCOMM_DEVICE PacketRange payload_after(const LowLatencyParams& params,
                                                     const PacketRange& heads) {
        return {payload_of(params, heads.packets), Spec::kNumThreads, Spec::kPackets};
    }

    DEEPCOMM_DEVICE void load(const LowLatencyParams& params, const device::Block& block,
                              const LowLatencyTurn& turn, const Pair& next) {
        pair = next;
        is_kept = next.source == params.comm.rank && keeps_row<Shared>(block, next.token);
        if (is_kept) return;
        const PacketRange range = heads(params, block, turn, next);
        head.load(range, device::Warp{}.thread_idx());
        payload.load(payload_after(params, range), block.thread_idx());
    }

    /// Loads again what has not come.
    DEEPCOMM_DEVICE void reload(const LowLatencyParams& params, const device::Block& block,
                                const LowLatencyTurn& turn) {
        if (pair.token < 0 || is_kept) return;
        const PacketRange range = heads(params, block, turn, pair);
        head.reload(range, device::Warp{}.thread_idx(), turn.tag);
        payload.reload(payload_after(params, range), block.thread_idx(), turn.tag);
    }
};

/// What the head of a row that is kept would say to a lane.
template <typename Shared>
DEEPCOMM_DEVICE Vec128 kept_head(const LowLatencyParams& params, const device::Warp& warp,
                                 const Shared& shared) {
    const int32_t k = warp.thread_idx();
    if (k >= params.num_topk || shared.entries[k].dst_idx != kKeptRow) {
        return {{kNoExpert, 0, 0, 0}};
    }
    const LowLatencyEntry& entry = shared.entries[k];
    return {{static_cast<uint32_t>(entry.local_expert), position_of(shared, k),
             device::float_bits(entry.weight), 0}};
}

/// The last warp: polls what of a row's head has not come, and says where its copies go.
template <typename Shared>
DEEPCOMM_DEVICE Arrival place_row(const LowLatencyDispatchParams& params, const PacketRange& heads,
                                  const device::WaitSite& site, uint32_t tag,
                                  RowPackets<Shared>& row, Shared& shared) {
    const device::Warp warp;
    Vec128& head = row.head.packets[0];
    Arrival arrival = Arrival::kHere;
    if (row.is_kept) {
        head = kept_head(params.base, warp, shared);
    } else {
        arrival = row.head.wait(params.base, site, heads, warp.thread_idx(), tag);
        const bool is_here = arrival == Arrival::kHere && warp.thread_idx() < params.base.num_topk;
        if (!is_here) head = {{kNoExpert, 0, 0, 0}};
    }
    if (params.is_token_layout) {
        place_token(params, warp, row.pair, shared);
    } else {
        place_copies(params, warp, row.pair, head, shared);
    }
    return arrival;
}

/// The last warp: writes what a row's head says, beside the others' copies.
template <typename Shared>
DEEPCOMM_DEVICE void record_row(const LowLatencyDispatchParams& params,
                                const RowPackets<Shared>& row, const Shared& shared) {
    const device::Warp warp;
    if (params.is_token_layout) {
        record_token(params, warp, row.pair, row.head.packets[0], shared);
    } else {
        record_copies(params, warp, row.pair, row.head.packets[0], shared);
    }
}

}  // namespace deepcomm::kernels::low_latency
