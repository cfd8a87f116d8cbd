// SPDX-License-Identifier: Apache-2.0
// Role: every block reads the headers of all sources, so that it knows where each row belongs, and
// then delivers rows: one block a (source, token), one copy for each local expert. PROTOCOLS.md:
// low_latency_dispatch.
#pragma once

#include "kernels/low_latency/dispatch_outputs.cuh"

namespace deepcomm::kernels::low_latency {

/// Whether a token of a source has an expert here.
template <typename Shared>
DEEPCOMM_DEVICE bool comes_here(const LowLatencyParams& params, const Shared& shared,
                                int32_t source, int32_t token) {
    if (shared.peers.masked[source] || token >= shared.num_tokens[source]) return false;
    const int32_t word = source * params.map.token_words + token / 32;
    return (shared.token_bits[word] >> token % 32 & 1u) != 0;
}

/// Tokens with an expert here of the sources before this one, and of this one before token.
template <typename Shared>
DEEPCOMM_DEVICE int32_t token_slot(const LowLatencyParams& params, const device::Warp& warp,
                                   const Shared& shared, int32_t source, int32_t token) {
    const int32_t last = source * params.map.token_words + token / 32;
    int32_t count = 0;
    for (int32_t word = warp.thread_idx(); word <= last; word += device::kWarpSize) {
        const uint32_t before = word < last ? device::kFullMask : (1u << token % 32) - 1u;
        count += device::popcount(shared.token_bits[word] & before);
    }
    for (int32_t distance = device::kWarpSize / 2; distance > 0; distance /= 2) {
        count += device::warp_shuffle_xor(count, distance);
    }
    return count;
}

/// The first warp: polls the head of a row and says where its copies go. EXPERT_PADDED.
template <typename Shared>
DEEPCOMM_DEVICE void place_copies(const LowLatencyDispatchParams& params, const device::Warp& warp,
                                  const Pair& pair, const Vec128& head, Shared& shared) {
    const LowLatencyParams& base = params.base;
    const uint32_t expert = head.words[0];
    const bool is_here = expert != kNoExpert;
    int32_t order = 0;  // copies of smaller experts
    for (int32_t k = 0; k < base.num_topk; ++k) {
        order += device::warp_shuffle(expert, k) < expert ? 1 : 0;
    }
    const int32_t num_copies = device::popcount(device::warp_ballot(is_here));
    if (warp.is_leader()) shared.num_copies = num_copies;
    int32_t* entries = base.record + base.record_map.entries + pair.index * base.num_topk;
    if (is_here) {
        const auto local = static_cast<int32_t>(expert);
        const uint32_t before =
            shared.counts[pair.source * base.map.num_local_experts + local] + head.words[1];
        const int32_t slot =
            local * base.map.num_ranks * base.map.max_tokens + static_cast<int32_t>(before);
        shared.slots[order] = slot;
        entries[order] = slot | warp.thread_idx() << layout::kEntrySlotBits;
        base.record[base.record_map.weights + pair.index * base.num_topk + order] =
            static_cast<int32_t>(head.words[2]);
        if (params.out_topk_weights != nullptr) {
            params.out_topk_weights[slot] = device::float_from_bits(head.words[2]);
        }
    }
    const int32_t lane = warp.thread_idx();
    if (lane >= num_copies && lane < base.num_topk) entries[lane] = layout::kNoEntry;
}

/// The same for TOKEN: one row, with the experts and weights of the token.
template <typename Shared>
DEEPCOMM_DEVICE void place_token(const LowLatencyDispatchParams& params, const device::Warp& warp,
                                 const Pair& pair, const Vec128& head, Shared& shared) {
    const LowLatencyParams& base = params.base;
    const int32_t slot = token_slot(base, warp, shared, pair.source, pair.token);
    const int32_t k = warp.thread_idx();
    if (warp.is_leader()) {
        shared.num_copies = 1;
        shared.slots[0] = slot;
    }
    if (k >= base.num_topk) return;
    base.record[base.record_map.entries + pair.index * base.num_topk + k] =
        k == 0 ? slot : layout::kNoEntry;
    const bool is_here = head.words[0] != kNoExpert;
    const int64_t index = static_cast<int64_t>(slot) * base.num_topk + k;
    store_id(params, index, is_here ? static_cast<int32_t>(head.words[0]) : -1);
    if (params.out_topk_weights == nullptr) return;
    params.out_topk_weights[index] = is_here ? device::float_from_bits(head.words[2]) : 0.0f;
}

/// Polls a row and its head; stages it and says where its copies go.
template <typename Shared>
DEEPCOMM_DEVICE Arrival take_row(const LowLatencyDispatchParams& params, const device::Block& block,
                                 const LowLatencyTurn& turn, const Pair& pair, Shared& shared) {
    using Spec = typename Shared::Spec;
    constexpr int32_t kAll = (Spec::kPackets + Spec::kNumThreads - 1) / Spec::kNumThreads;
    constexpr int32_t kCount = kAll < 6 ? kAll : 6;  // packets of a thread in flight
    const LowLatencyParams& base = params.base;
    const Vec128* head =
        packets_at(base.local, base.map.row_offset(turn.slot, pair.source, pair.token));
    const PacketRange payload = {head + base.map.num_topk, Spec::kNumThreads, Spec::kPackets};
    const device::Warp warp;
    const PacketRange heads = {head, device::kWarpSize, warp.warp_idx() == 0 ? base.num_topk : 0};
    const device::WaitSite site = {Operation::kLowLatencyDispatch, device::Role::kReceive,
                                   pair.source, pair.token};
    PacketBatch<1> mine;
    mine.load(heads, warp.thread_idx());
    Arrival arrival = Arrival::kHere;
    for (int32_t i = 0; i < kAll; i += kCount) {
        const int32_t first = block.thread_idx() + i * Spec::kNumThreads;
        PacketBatch<kCount> batch;
        batch.load(payload, first);
        if (arrival == Arrival::kHere) {
            arrival = batch.wait(base, site, payload, first, turn.tag);
        }
        stage_packets<Spec>(batch, first, shared);
    }
    if (warp.warp_idx() != 0) return arrival;
    const Arrival own = mine.wait(base, site, heads, warp.thread_idx(), turn.tag);
    const bool is_here = own == Arrival::kHere && warp.thread_idx() < base.num_topk;
    if (!is_here) mine.packets[0] = {{kNoExpert, 0, 0, 0}};
    if (params.is_token_layout) {
        place_token(params, warp, pair, mine.packets[0], shared);
    } else {
        place_copies(params, warp, pair, mine.packets[0], shared);
    }
    return arrival == Arrival::kHere ? own : arrival;
}

/// What became of a row.
enum class RowEnd { kStaged, kLost, kFailed };

/// Waits for one row; the block may then write its copies.
template <typename Shared>
DEEPCOMM_DEVICE RowEnd await_row(const LowLatencyDispatchParams& params, const device::Block& block,
                                 const LowLatencyTurn& turn, const Pair& pair, Shared& shared) {
    block.sync();  // ORDER: the row before has left shared memory
    const Arrival arrival = take_row(params, block, turn, pair, shared);
    // ORDER: the row, to all
    if (!block.sync_and(arrival != Arrival::kFailed)) return RowEnd::kFailed;
    if (!params.base.mask_late || block.sync_and(arrival == Arrival::kHere)) return RowEnd::kStaged;
    // Its source was lost between its header and this row, which stays as it is.
    if (block.is_leader()) mask_late_peer(params.base, pair.source);
    return RowEnd::kLost;
}

/// What the combine must know of the receive phase; one block writes it.
template <typename Shared>
DEEPCOMM_DEVICE void record_receive(const LowLatencyParams& params, const device::Block& block,
                                    bool is_void, const Shared& shared) {
    if (block.block_idx() != 0) return;
    int32_t* num_tokens = params.record + params.record_map.num_tokens;
    for (int32_t source = block.thread_idx(); source < params.map.num_ranks;
         source += block.size()) {
        num_tokens[source] = is_void ? 0 : shared.num_tokens[source];
    }
    if (block.is_leader()) params.record[params.record_map.is_void] = is_void ? 1 : 0;
}

/// The pairs of a block, one after the other: rows of this rank's own tokens first, since they are
/// here before those of the peers. Says on the way which pairs do not exist.
template <typename Shared>
struct PairWalk {
    const LowLatencyParams& params;
    const Shared& shared;
    int32_t most;  ///< tokens of any source
    int32_t next;
    int32_t lost_source = layout::kNoPeer;  ///< nothing is awaited from there any more

    /// False: none is left.
    DEEPCOMM_DEVICE bool advance(const device::Block& block, Pair* pair) {
        const int32_t num_topk = params.num_topk;
        for (; next < most * params.map.num_ranks; next += block.num_blocks()) {
            const int32_t source = (params.comm.rank + next / most) % params.map.num_ranks;
            const int32_t token = next % most;
            *pair = {source, token, static_cast<int64_t>(source) * params.map.max_tokens + token};
            if (source != lost_source && comes_here(params, shared, source, token)) {
                next += block.num_blocks();
                return true;
            }
            if (block.thread_idx() < num_topk && token < shared.num_tokens[source]) {
                const int64_t entry = pair->index * num_topk + block.thread_idx();
                params.record[params.record_map.entries + entry] = layout::kNoEntry;
            }
        }
        return false;
    }
};

/// Delivers the block's rows. Its arrival is ahead of the last row's copies, whose way to memory
/// nobody else waits for.
template <int kPhases, typename Shared>
DEEPCOMM_DEVICE void deliver_rows(const LowLatencyDispatchParams& params,
                                  const device::Block& block, const LowLatencyTurn& turn,
                                  Shared& shared) {
    int32_t most = 0;
    for (int32_t source = 0; source < params.base.map.num_ranks; ++source) {
        most = shared.num_tokens[source] > most ? shared.num_tokens[source] : most;
    }
    PairWalk<Shared> walk = {params.base, shared, most, block.block_idx()};
    Pair pair, following;
    bool has_pair = walk.advance(block, &pair);
    if (!has_pair) finish_receive(params.base, block, turn, kPhases);
    while (has_pair) {
        const RowEnd end = await_row(params, block, turn, pair, shared);
        if (end == RowEnd::kFailed) return;
        if (end == RowEnd::kLost) walk.lost_source = pair.source;
        has_pair = walk.advance(block, &following);
        if (!has_pair) finish_receive(params.base, block, turn, kPhases);
        if (end == RowEnd::kStaged) write_copies(params, block, shared);
        pair = following;
    }
}

/// The receive phase and its end, unless it fails.
template <int kPhases, typename Shared>
DEEPCOMM_DEVICE void receive_dispatch(const LowLatencyDispatchParams& params,
                                      const device::Block& block, const LowLatencyTurn& turn,
                                      Shared& shared) {
    if (!receive_headers(params, block, turn, shared)) return;
    const int32_t culprit = find_culprit(params.base, shared.refusals);
    const bool is_void = culprit != layout::kNoPeer;
    record_receive(params.base, block, is_void, shared);
    if (is_void) {
        end_without_rows(params, block, turn, culprit, shared);
        finish_receive(params.base, block, turn, kPhases);
        return;
    }
    sum_counts(params.base, block, shared);
    write_totals(params, block, shared);
    write_padding(params, block, shared);
    deliver_rows<kPhases>(params, block, turn, shared);
}

}  // namespace deepcomm::kernels::low_latency
