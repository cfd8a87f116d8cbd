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
DEEPCOMM_DEVICE void place_copies(const LowLatencyParams& params, const device::Warp& warp,
                                  const Pair& pair, const Vec128& head, Shared& shared) {
    const uint32_t expert = head.words[0];
    const bool is_here = expert != kNoExpert;
    int32_t order = 0;  // copies of smaller experts
    DEEPCOMM_NO_UNROLL
    for (int32_t begin = 0; begin < params.num_topk; begin += kColumnsAtOnce) {
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kColumnsAtOnce; ++i) {
            order += device::warp_shuffle(expert, begin + i) < expert ? 1 : 0;
        }
    }
    const int32_t num_copies = device::popcount(device::warp_ballot(is_here));
    if (warp.is_leader()) shared.num_copies = num_copies;
    if (!is_here) return;
    const auto local = static_cast<int32_t>(expert);
    const uint32_t before = count_before(params, shared, pair.source, local) + head.words[1];
    shared.slots[order] =
        local * params.map.num_ranks * params.map.max_tokens + static_cast<int32_t>(before);
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
DEEPCOMM_DEVICE void place_token(const LowLatencyParams& params, const device::Warp& warp,
                                 const Pair& pair, Shared& shared) {
    const int32_t slot = token_slot(params, warp, shared, pair);
    if (!warp.is_leader()) return;
    shared.num_copies = 1;
    shared.slots[0] = slot;
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

/// A row's packets and its head, on their way to the threads that stage them.
template <typename Spec>
struct RowPackets {
    static constexpr int32_t kAll = Spec::kPacketsOfThread;
    static constexpr int32_t kCount = kAll < 6 ? kAll : 6;  ///< of a thread in flight

    Pair pair;  ///< token -1: none yet
    PacketBatch<kCount> payload;
    PacketBatch<1> head;  ///< in the last warp

    static DEEPCOMM_DEVICE PacketRange heads(const LowLatencyParams& params,
                                             const device::Block& block, const LowLatencyTurn& turn,
                                             const Pair& pair) {
        const int64_t offset = params.map.row_offset(turn.slot, pair.source, pair.token);
        return {packets_at(params.local, offset), device::kWarpSize,
                is_in_last_warp(block) ? params.num_topk : 0};
    }

    static DEEPCOMM_DEVICE PacketRange payload_after(const LowLatencyParams& params,
                                                     const PacketRange& heads) {
        return {heads.packets + params.num_topk, Spec::kNumThreads, Spec::kPackets};
    }

    DEEPCOMM_DEVICE void load(const LowLatencyParams& params, const device::Block& block,
                              const LowLatencyTurn& turn, const Pair& next) {
        const PacketRange range = heads(params, block, turn, next);
        pair = next;
        head.load(range, device::Warp{}.thread_idx());
        payload.load(payload_after(params, range), block.thread_idx());
    }

    /// Loads again what has not come.
    DEEPCOMM_DEVICE void reload(const LowLatencyParams& params, const device::Block& block,
                                const LowLatencyTurn& turn) {
        const PacketRange range = heads(params, block, turn, pair);
        head.reload(range, device::Warp{}.thread_idx(), turn.tag);
        payload.reload(payload_after(params, range), block.thread_idx(), turn.tag);
    }
};

/// The last warp: where copies go, by the head that is sent to others or has come.
template <typename Shared>
DEEPCOMM_DEVICE void place_by_head(const LowLatencyDispatchParams& params, const device::Warp& warp,
                                   const RowPackets<typename Shared::Spec>& row, Shared& shared) {
    if (params.is_token_layout) {
        place_token(params.base, warp, row.pair, shared);
    } else {
        place_copies(params.base, warp, row.pair, row.head.packets[0], shared);
    }
}

/// The last warp: polls what of a row's head has not come, and says where its copies go.
template <typename Shared>
DEEPCOMM_DEVICE Arrival place_row(const LowLatencyDispatchParams& params, const PacketRange& heads,
                                  const device::WaitSite& site, uint32_t tag,
                                  RowPackets<typename Shared::Spec>& row, Shared& shared) {
    const device::Warp warp;
    const Arrival arrival = row.head.wait(params.base, site, heads, warp.thread_idx(), tag);
    const bool is_here = arrival == Arrival::kHere && warp.thread_idx() < params.base.num_topk;
    if (!is_here) row.head.packets[0] = {{kNoExpert, 0, 0, 0}};
    place_by_head(params, warp, row, shared);
    return arrival;
}

/// The row that the block has sent last, and kept as it is staged.
template <typename Shared>
DEEPCOMM_DEVICE void take_kept_row(const LowLatencyDispatchParams& params,
                                   const device::Block& block,
                                   RowPackets<typename Shared::Spec>& row, Shared& shared) {
    const device::Warp warp;
    if (is_in_last_warp(block)) {
        const int32_t k = warp.thread_idx();
        row.head.packets[0] = {{kNoExpert, 0, 0, 0}};
        if (k < params.base.num_topk && shared.entries[k].dst_idx == kKeptRow) {
            const LowLatencyEntry& entry = shared.entries[k];
            row.head.packets[0] = {{static_cast<uint32_t>(entry.local_expert),
                                    shared.positions[0][k], device::float_bits(entry.weight), 0}};
        }
        place_by_head(params, warp, row, shared);
    }
    block.sync();  // ORDER: where the copies go, to all
}

/// The last warp: writes what a row's head says, beside the others' copies.
template <typename Shared>
DEEPCOMM_DEVICE void record_row(const LowLatencyDispatchParams& params,
                                const RowPackets<typename Shared::Spec>& row,
                                const Shared& shared) {
    const device::Warp warp;
    if (params.is_token_layout) {
        record_token(params, warp, row.pair, row.head.packets[0], shared);
    } else {
        record_copies(params, warp, row.pair, row.head.packets[0], shared);
    }
}

/// Polls what of a row and its head has not come; stages it and says where its copies go, which takes
/// longer.
template <typename Shared>
DEEPCOMM_DEVICE Arrival take_row(const LowLatencyDispatchParams& params, const device::Block& block,
                                 const LowLatencyTurn& turn, RowPackets<typename Shared::Spec>& row,
                                 Shared& shared) {
    using Spec = typename Shared::Spec;
    using Row = RowPackets<Spec>;
    const LowLatencyParams& base = params.base;
    const PacketRange heads = Row::heads(base, block, turn, row.pair);
    const PacketRange payload = Row::payload_after(base, heads);
    const device::WaitSite site = {Operation::kLowLatencyDispatch, device::Role::kReceive,
                                   row.pair.source, row.pair.token};
    // Larger rows leave no register for it while their packets are held.
    constexpr bool kIsPlacedFirst = Row::kCount <= 4;
    const bool places = is_in_last_warp(block);
    Arrival arrival = Arrival::kHere;
    if (kIsPlacedFirst && places) {
        arrival = place_row(params, heads, site, turn.tag, row, shared);
    }
    for (int32_t i = 0; i < Row::kAll; i += Row::kCount) {
        const int32_t first = block.thread_idx() + i * Spec::kNumThreads;
        if (i > 0) row.payload.load(payload, first);
        if (arrival == Arrival::kHere) {
            arrival = row.payload.wait(base, site, payload, first, turn.tag);
        }
        stage_packets<Spec>(row.payload, first, shared);
    }
    if (kIsPlacedFirst || !places) return arrival;
    const Arrival own = place_row(params, heads, site, turn.tag, row, shared);
    return arrival == Arrival::kHere ? own : arrival;
}

/// What became of a row.
enum class RowEnd { kStaged, kLost, kFailed };

/// Waits for one row; the block may then write its copies.
template <typename Shared>
DEEPCOMM_DEVICE RowEnd await_row(const LowLatencyDispatchParams& params, const device::Block& block,
                                 const LowLatencyTurn& turn, RowPackets<typename Shared::Spec>& row,
                                 Shared& shared) {
    block.sync();  // ORDER: the row before has left shared memory
    const Arrival arrival = take_row(params, block, turn, row, shared);
    // ORDER: the row, to all
    if (!block.sync_and(arrival != Arrival::kFailed)) return RowEnd::kFailed;
    if (!params.base.mask_late || block.sync_and(arrival == Arrival::kHere)) return RowEnd::kStaged;
    // Its source was lost between its header and this row, which stays as it is.
    if (block.is_leader()) mask_late_peer(params.base, row.pair.source);
    return RowEnd::kLost;
}

/// Whether a block writes what there is once in a receive phase: the one that is the last to have rows.
DEEPCOMM_DEVICE bool keeps_counts(const device::Block& block) {
    return block.block_idx() == block.num_blocks() - 1;
}

/// What the combine must know of the receive phase; one block writes it.
template <typename Shared>
DEEPCOMM_DEVICE void record_receive(const LowLatencyParams& params, const device::Block& block,
                                    bool is_void, const Shared& shared) {
    if (!keeps_counts(block)) return;
    int32_t* num_tokens = params.record + params.record_map.num_tokens;
    for (int32_t source = block.thread_idx(); source < params.map.num_ranks;
         source += block.size()) {
        num_tokens[source] = is_void ? 0 : shared.num_tokens[source];
    }
    if (block.is_leader()) params.record[params.record_map.is_void] = is_void ? 1 : 0;
}

/// Tokens of the source that has most of them.
template <typename Shared>
DEEPCOMM_DEVICE int32_t most_tokens(const LowLatencyParams& params, const Shared& shared) {
    int32_t most = 0;
    DEEPCOMM_NO_UNROLL
    for (int32_t source = 0; source < params.map.num_ranks; ++source) {
        most = shared.num_tokens[source] > most ? shared.num_tokens[source] : most;
    }
    return most;
}

/// The order of all pairs: rows of this rank's own tokens first, since they are here before those of
/// the peers; most: tokens of any source.
DEEPCOMM_DEVICE Pair pair_at(const LowLatencyParams& params, int32_t most, int32_t idx) {
    const int32_t source = (params.comm.rank + idx / most) % params.map.num_ranks;
    const int32_t token = idx % most;
    return {source, token};
}

/// The pairs of a block, one after the other. Says on the way which pairs do not exist.
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
        DEEPCOMM_NO_UNROLL
        for (; next < most * params.map.num_ranks; next += block.num_blocks()) {
            *pair = pair_at(params, most, next);
            const int32_t source = pair->source, token = pair->token;
            if (source != lost_source && comes_here(params, shared, source, token)) {
                next += block.num_blocks();
                return true;
            }
            if (block.thread_idx() < num_topk && token < shared.num_tokens[source]) {
                const int64_t entry = pair->index(params) * num_topk + block.thread_idx();
                params.record[params.record_map.entries + entry] = layout::kNoEntry;
            }
        }
        return false;
    }
};

/// Loads what is probably the block's first row, before the headers say so; one that is kept is here.
template <typename Shared>
DEEPCOMM_DEVICE void guess_row(const LowLatencyParams& params, const device::Block& block,
                               const LowLatencyTurn& turn, RowPackets<typename Shared::Spec>* row) {
    const int32_t most = params.num_tokens;  // ranks have the same number, as a rule
    row->pair = {0, -1};
    const bool is_kept = Shared::kKeepsRow && block.block_idx() < most;
    if (is_kept || block.block_idx() >= most * params.map.num_ranks) return;
    row->load(params, block, turn, pair_at(params, most, block.block_idx()));
}

/// Delivers the block's rows; row: the guess. A row's packets are loaded while the copies of the one
/// before are written, and the arrival is beside the last row's copies, whose way to memory nobody
/// else waits for. False: leave.
template <int kPhases, typename Shared>
DEEPCOMM_DEVICE bool deliver_rows(const LowLatencyDispatchParams& params,
                                  const device::Block& block, const LowLatencyTurn& turn,
                                  RowPackets<typename Shared::Spec>& row, Shared& shared) {
    const LowLatencyParams& base = params.base;
    PairWalk<Shared> walk = {base, shared, most_tokens(base, shared), block.block_idx()};
    Pair pair = row.pair;
    bool has_pair = walk.advance(block, &pair);
    if (!has_pair) finish_receive<kPhases>(base, block, turn);
    bool is_kept = pair.source == base.comm.rank && keeps_row<Shared>(block, pair.token);
    const bool is_guessed = pair.source == row.pair.source && pair.token == row.pair.token;
    if (has_pair && !is_guessed && !is_kept) row.load(base, block, turn, pair);
    DEEPCOMM_NO_UNROLL
    while (has_pair) {
        RowEnd end = RowEnd::kStaged;
        if (is_kept) {
            row.pair = pair;
            take_kept_row(params, block, row, shared);
        } else {
            end = await_row(params, block, turn, row, shared);
        }
        is_kept = false;
        if (end == RowEnd::kFailed) return false;
        if (end == RowEnd::kLost) walk.lost_source = row.pair.source;
        if (is_in_last_warp(block)) record_row(params, row, shared);
        has_pair = walk.advance(block, &pair);
        if (has_pair) {
            row.load(base, block, turn, pair);
        } else {
            finish_receive<kPhases>(base, block, turn);
        }
        if (end == RowEnd::kStaged && !is_in_last_warp(block)) {
            write_copies(params, block, shared);
            write_scales(params, block, shared);
        }
    }
    return true;
}

/// What no row waits for: counts, and what rows without a token hold. Done by blocks that have no rows,
/// if they are not few.
template <typename Shared>
DEEPCOMM_DEVICE void write_counts(const LowLatencyDispatchParams& params,
                                  const device::Block& block, Shared& shared) {
    const int32_t num_blocks = block.num_blocks();
    const int32_t num_pairs = most_tokens(params.base, shared) * params.base.map.num_ranks;
    const int32_t first_block = num_blocks - num_pairs > num_blocks / 4 ? num_pairs : 0;
    if (block.block_idx() < first_block) return;
    sum_counts(params.base, block, shared);
    if (keeps_counts(block)) write_totals(params, block, shared);
    write_padding(params, block, first_block, shared);
}

/// The receive phase and its end, unless it fails. A row is looked for before and after the headers:
/// what has come by then costs no trip to memory of its own.
template <int kPhases, typename Shared>
DEEPCOMM_DEVICE void receive_dispatch(const LowLatencyDispatchParams& params,
                                      const device::Block& block, const LowLatencyTurn& turn,
                                      Shared& shared) {
    RowPackets<typename Shared::Spec> row;
    guess_row<Shared>(params.base, block, turn, &row);
    if (!receive_headers(params, block, turn, shared)) return;
    if (row.pair.token >= 0) row.reload(params.base, block, turn);
    const int32_t culprit = find_culprit(params.base, shared.refusals);
    const bool is_void = culprit != layout::kNoPeer;
    record_receive(params.base, block, is_void, shared);
    if (is_void) {
        end_without_rows(params, block, turn, culprit, shared);
        finish_receive<kPhases>(params.base, block, turn);
        return;
    }
    if (!deliver_rows<kPhases>(params, block, turn, row, shared)) return;
    write_counts(params, block, shared);
}

}  // namespace deepcomm::kernels::low_latency
