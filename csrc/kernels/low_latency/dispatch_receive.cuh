// SPDX-License-Identifier: Apache-2.0
// Role: every block reads the headers of all sources, so that it knows where each row belongs, and
// then delivers rows: one block a (source, token), one copy for each local expert. PROTOCOLS.md:
// low_latency_dispatch.
#pragma once

#include "kernels/low_latency/dispatch_rows.cuh"
#include "kernels/low_latency/pair_cursor.cuh"

namespace deepcomm::kernels::low_latency {

/// Whether a token of a source has an expert here.
template <typename Shared>
DEEPCOMM_DEVICE bool comes_here(const LowLatencyParams& params, const Shared& shared,
                                int32_t source, int32_t token) {
    if (shared.peers.masked[source] || token >= shared.num_tokens[source]) return false;
    const int32_t word = source * params.map.token_words + token / 32;
    return (shared.token_bits[word] >> token % 32 & 1u) != 0;
}

/// Polls what of a row and its head has not come; stages it, unless it is, and says where its copies go,
/// which takes longer.
template <typename Shared>
DEEPCOMM_DEVICE Arrival take_row(const LowLatencyDispatchParams& params, const device::Block& block,
                                 const LowLatencyTurn& turn, RowPackets<Shared>& row,
                                 Shared& shared) {
    using Spec = typename Shared::Spec;
    using Row = RowPackets<Shared>;
    const LowLatencyParams& base = params.base;
    const PacketRange heads = Row::heads(base, block, turn, row.pair);
    const PacketRange payload = Row::payload_after(base, heads);
    const device::WaitSite site = {Operation::kLowLatencyDispatch, device::Role::kReceive,
                                   row.pair.source, row.pair.token};
    // Larger rows leave no register for it while their packets are held.
    constexpr bool kIsPlacedFirst = Row::kCount < 4;
    const bool places = is_in_last_warp(block);
    Arrival arrival = Arrival::kHere;
    if (kIsPlacedFirst && places) {
        arrival = place_row(params, heads, site, turn.tag, row, shared);
    }
    for (int32_t i = 0; i < Row::kAll && !row.is_kept; i += Row::kCount) {
        const int32_t first = block.thread_idx() + i * Spec::kNumThreads;
        if (i > 0) row.payload.load(payload, first);
        if (arrival == Arrival::kHere) {
            arrival = row.payload.wait(base, site, payload, first, turn.tag);
            if (arrival == Arrival::kHere) row.payload.clear(payload, first);
        }
        stage_packets<Spec>(row.payload, first, shared);
    }
    if (kIsPlacedFirst || !places) return arrival;
    const Arrival own = place_row(params, heads, site, turn.tag, row, shared);
    return arrival == Arrival::kHere ? own : arrival;
}

/// What became of a row.
enum class RowEnd { kNone, kStaged, kLost, kFailed };

/// Waits for one row; the block may then write its copies.
template <typename Shared>
DEEPCOMM_DEVICE RowEnd await_row(const LowLatencyDispatchParams& params, const device::Block& block,
                                 const LowLatencyTurn& turn, RowPackets<Shared>& row,
                                 Shared& shared) {
    if (!row.is_kept) {
        block.sync();  // ORDER: the row before has left shared memory
    }
    const Arrival arrival = take_row(params, block, turn, row, shared);
    // ORDER: the row, to all
    if (!block.sync_and(arrival != Arrival::kFailed)) return RowEnd::kFailed;
    if (!params.base.mask_late || block.sync_and(arrival == Arrival::kHere)) return RowEnd::kStaged;
    // Its source was lost between its header and this row.
    // By the thread that ends the phase for the block.
    if (ends_receive(block)) {
        mask_late_peer<Shared::kHasNodes>(params.base, turn, row.pair.source);
    }
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
    DEEPCOMM_NO_UNROLL
    for (int32_t source = block.thread_idx(); source < params.map.num_ranks;
         source += block.size()) {
        num_tokens[source] = is_void ? 0 : shared.num_tokens[source];
    }
    if (block.is_leader()) params.record[params.record_map.is_void] = is_void ? 1 : 0;
}

/// Where a cursor is: rows of this rank's own tokens come first, since they are here before those of the
/// peers.
DEEPCOMM_DEVICE Pair pair_at(const LowLatencyParams& params, const PairCursor& cursor) {
    return {cursor.rank(params, params.comm.rank), cursor.item};
}

/// The pairs of a block, one after the other. Says on the way which pairs do not exist.
template <typename Shared>
struct PairWalk {
    const LowLatencyParams& params;
    const Shared& shared;
    PairCursor cursor;
    int32_t lost_source = layout::kNoPeer;  ///< nothing is awaited from there any more

    /// False: none is left.
    DEEPCOMM_DEVICE bool advance(const device::Block& block, Pair* pair) {
        const int32_t num_topk = params.num_topk;
        DEEPCOMM_NO_UNROLL
        while (cursor.find(params)) {
            *pair = pair_at(params, cursor);
            cursor.item += block.num_blocks();
            const int32_t source = pair->source, token = pair->token;
            if (source != lost_source && comes_here(params, shared, source, token)) return true;
            if (block.thread_idx() < num_topk && token < shared.num_tokens[source]) {
                const int64_t entry = pair->index(params) * num_topk + block.thread_idx();
                params.record[params.record_map.entries + entry] = layout::kNoEntry;
            }
        }
        return false;
    }
};

/// Loads what is probably the block's first row, before the headers say so.
template <typename Shared>
DEEPCOMM_DEVICE void guess_row(const LowLatencyParams& params, const device::Block& block,
                               const LowLatencyTurn& turn, RowPackets<Shared>* row) {
    // Ranks have the same number of tokens, as a rule.
    PairCursor cursor = {params.num_tokens, block.block_idx()};
    if (cursor.find(params)) row->load(params, block, turn, pair_at(params, cursor));
}

/// Delivers the block's rows; row: the guess. A row's packets are loaded while the copies of the one
/// before are written, and the arrival is beside the last row's copies, whose way to memory nobody
/// else waits for. False: leave.
template <int kPhases, typename Shared>
DEEPCOMM_DEVICE bool deliver_rows(const LowLatencyDispatchParams& params,
                                  const device::Block& block, const LowLatencyTurn& turn,
                                  RowPackets<Shared>& row, Shared& shared) {
    const LowLatencyParams& base = params.base;
    PairWalk<Shared> walk = {base, shared, {most_tokens(base, shared), block.block_idx()}};
    Pair next;
    bool has_next = walk.advance(block, &next);
    RowEnd end = RowEnd::kNone;
    DEEPCOMM_NO_UNROLL
    while (true) {
        const bool has_row = has_next;
        if (!has_row) {
            if (params.admits_next) device::admit_next_kernel();
            finish_receive<kPhases>(base, block, turn);
        } else if (next.source != row.pair.source || next.token != row.pair.token) {
            row.load(base, block, turn, next);
        }
        if (end == RowEnd::kStaged && !is_in_last_warp(block)) {
            write_copies(params, block, shared);
            write_scales(params, block, shared);
        }
        if (!has_row) return true;
        // While the row is on its way.
        const PairCursor cursor = walk.cursor;
        has_next = walk.advance(block, &next);
        end = await_row(params, block, turn, row, shared);
        if (end == RowEnd::kFailed) return false;
        if (end == RowEnd::kLost) {
            walk.lost_source = row.pair.source;
            walk.cursor = cursor;
            has_next = walk.advance(block, &next);
        }
        if (is_in_last_warp(block)) record_row(params, row, shared);
    }
}

/// What no row waits for: counts, and what rows without a token hold. Done by blocks that have no rows,
/// if they are not too few.
template <typename Shared>
DEEPCOMM_DEVICE void write_counts(const LowLatencyDispatchParams& params,
                                  const device::Block& block, Shared& shared) {
    constexpr int32_t kMostForOne = 8;  ///< blocks whose share a block does
    const int32_t num_blocks = block.num_blocks();
    const int32_t num_pairs = most_tokens(params.base, shared) * params.base.map.num_ranks;
    const int32_t first_block =
        (num_blocks - num_pairs) * kMostForOne >= num_blocks ? num_pairs : 0;
    if (block.block_idx() < first_block) return;
    sum_counts(params.base, block, shared);
    if (keeps_counts(block)) write_totals(params, block, shared);
    if (params.is_token_layout) {
        pad_tokens(params, block, first_block, shared);
    } else {
        pad_experts(params, block, first_block, shared);
    }
}

/// The receive phase and its end, unless it fails. A row is looked for before and after the headers:
/// what has come by then costs no trip to memory of its own.
template <int kPhases, typename Shared>
DEEPCOMM_DEVICE void receive_dispatch(const LowLatencyDispatchParams& params,
                                      const device::Block& block, const LowLatencyTurn& turn,
                                      Shared& shared) {
    RowPackets<Shared> row;
    // Not of a source that this block has skipped so far: where late ones are masked, others may know more.
    if (Shared::kHasNodes || !params.base.mask_late) {
        guess_row<Shared>(params.base, block, turn, &row);
    }
    if (!receive_headers(params, block, turn, shared)) return;
    row.reload(params.base, block, turn);
    const int32_t culprit = find_culprit(params.base, shared.refusals);
    const bool is_void = culprit != layout::kNoPeer;
    record_receive(params.base, block, is_void, shared);
    if (is_void) {
        end_without_rows(params, block, turn, culprit, shared);
        block.sync();  // ORDER: the refusal's text has been read, and what is left unread is noted
        finish_receive<kPhases>(params.base, block, turn);
        return;
    }
    if (!deliver_rows<kPhases>(params, block, turn, row, shared)) return;
    write_counts(params, block, shared);
}

}  // namespace deepcomm::kernels::low_latency
