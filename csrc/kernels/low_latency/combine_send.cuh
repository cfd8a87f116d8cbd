// SPDX-License-Identifier: Apache-2.0
// Role: for each part of a token that came here, a block sums those of the rows of its experts, rounds
// once and stores packets to the token's rank, or to the rank of this node that sums for it.
// PROTOCOLS.md: low_latency_combine.
#pragma once

#include "kernels/low_latency/combine_sum.cuh"
#include "kernels/low_latency/combine_weights.cuh"
#include "kernels/low_latency/pair_cursor.cuh"

namespace deepcomm::kernels::low_latency {

/// One part of one token of one source, to be summed here.
struct Summed {
    int32_t source;
    int32_t token;
    int32_t part;
};

/// Entry i of a token and the weight recorded for it, in lane i.
struct Entry {
    int32_t bits;  ///< or kNoEntry
    float weight;
};

/// Nothing here waits for the loads.
DEEPCOMM_DEVICE Entry load_entry(const LowLatencyCombineParams& params, const device::Warp& warp,
                                 const Summed& summed) {
    const LowLatencyParams& base = params.base;
    const int32_t lane = warp.thread_idx(), num_topk = base.num_topk;
    Entry entry = {layout::kNoEntry, 1.0f};
    if (lane >= num_topk) return entry;
    const int64_t index =
        (static_cast<int64_t>(summed.source) * base.map.max_tokens + summed.token) * num_topk +
        lane;
    entry.bits = base.record[base.record_map.entries + index];
    if (params.apply_weights && params.source_weights == nullptr) {
        entry.weight = device::float_from_bits(
            static_cast<uint32_t>(base.record[base.record_map.weights + index]));
    }
    return entry;
}

/// All lanes call it.
template <typename Spec>
DEEPCOMM_DEVICE ExpertRows rows_of(const LowLatencyCombineParams& params, const Entry& entry,
                                   int32_t part) {
    const bool is_row = entry.bits >= 0;
    ExpertRow mine = {nullptr, 1.0f, 0};
    if (is_row) {
        const int32_t slot = entry.bits & ((1 << layout::kEntrySlotBits) - 1);
        const unsigned char* row = params.y + slot * params.y_stride;
        mine = {row + part * Spec::kPartWords * 4, entry.weight,
                entry.bits >> layout::kEntrySlotBits};
    }
    return {mine, device::popcount(device::warp_ballot(is_row)), Spec::num_vectors(part)};
}

/// Waits for the weight that the token's rank has sent for a lane's entry.
DEEPCOMM_DEVICE Arrival await_weight(const LowLatencyCombineParams& params,
                                     const LowLatencyTurn& turn, const Summed& summed,
                                     ExpertRow* mine) {
    if (params.source_weights == nullptr || mine->part == nullptr) return Arrival::kHere;
    const LowLatencyParams& base = params.base;
    const device::WaitSite site = {Operation::kLowLatencyCombine, device::Role::kReduce,
                                   summed.source, summed.token};
    const auto words = static_cast<int32_t>(layout::kPacketWords);
    const int64_t offset = base.map.weights_offset(turn.slot, summed.source, summed.token);
    const Vec128* address = packets_at(base.local, offset) + mine->column / words;
    Vec128 packet{};
    const Arrival arrival = wait_packet(base, site, address, turn.tag, &packet);
    mine->weight = device::float_from_bits(payload_word(packet, mine->column % words));
    return arrival;
}

/// The value to bring back for one column of a token; entries: those of the token here.
DEEPCOMM_DEVICE float carried_value(const LowLatencyCombineParams& params, const int32_t* entries,
                                    int32_t column) {
    const int32_t num_topk = params.base.num_topk;
    if (column >= num_topk) return 0;
    if (params.is_token_layout) {
        return params.carried[static_cast<int64_t>(entries[0]) * num_topk + column];
    }
    DEEPCOMM_NO_UNROLL
    for (int32_t i = 0; i < num_topk && entries[i] >= 0; ++i) {
        if (entries[i] >> layout::kEntrySlotBits != column) continue;
        return params.carried[entries[i] & ((1 << layout::kEntrySlotBits) - 1)];
    }
    return 0;
}

/// Brings back the values of a token's columns, in the head of its row: three a thread.
DEEPCOMM_DEVICE void send_carried(const LowLatencyCombineParams& params, int32_t thread_idx,
                                  int64_t first, uint32_t tag, Vec128* head) {
    const auto column = thread_idx * static_cast<int32_t>(layout::kPacketWords);
    if (column >= params.base.num_topk) return;
    const int32_t* entries = params.base.record + params.base.record_map.entries + first;
    device::st_relaxed_sys(head + thread_idx,
                           {{device::float_bits(carried_value(params, entries, column)),
                             device::float_bits(carried_value(params, entries, column + 1)),
                             device::float_bits(carried_value(params, entries, column + 2)), tag}});
}

/// Where the row of a token that is summed here begins.
struct PartialPlace {
    int32_t rank;
    int64_t offset;
};

/// At the token's rank; of another node, at the rank of this one and its rail, which sums for it.
template <bool kHasNodes>
DEEPCOMM_DEVICE PartialPlace place_of(const LowLatencyParams& params, const LowLatencyTurn& turn,
                                      const Summed& summed) {
    const layout::LowLatencyLayout& map = params.map;
    const int32_t own = params.comm.rank, token = summed.token;
    if (!kHasNodes) return {summed.source, map.row_offset(turn.slot, own, token)};
    const int32_t node = summed.source / map.ranks_per_node;
    if (node == params.node_idx) return {summed.source, map.row_offset(turn.slot, own, token)};
    const int32_t rank = node_rank(params, summed.source % map.ranks_per_node);
    if (rank == own) return {own, map.rail_row_offset(turn.slot, node, token)};
    return {rank, map.row_offset(turn.slot, rail_rank(params, node), token)};
}

/// What becomes of the part in shared memory.
enum class Staged { kNothing, kToSend, kToKeep };

/// Stores the packets of a staged part, unless the block keeps it, and with a row's first one what the row
/// brings back.
template <typename Shared>
DEEPCOMM_DEVICE void store_partial(const LowLatencyCombineParams& params,
                                   const device::Block& block, const LowLatencyTurn& turn,
                                   const Summed& summed, Staged staged, Shared& shared) {
    using Spec = typename Shared::Spec;
    const LowLatencyParams& base = params.base;
    const PartialPlace place = place_of<Shared::kHasNodes>(base, turn, summed);
    Vec128* head = packets_at(shared.peers.bases[place.rank], place.offset);
    Vec128* packets = payload_of(base, head) + summed.part * Spec::kPartPackets;
    DEEPCOMM_NO_UNROLL
    for (int32_t i = block.thread_idx(); i < Spec::kPartPackets && staged == Staged::kToSend;
         i += block.size()) {
        const uint32_t* words = shared.row + i * Spec::Format::kWords;
        device::st_relaxed_sys(packets + i, Spec::Format::pack(words, turn.tag));
    }
    if (params.carried == nullptr || summed.part != 0) return;
    const int64_t index = static_cast<int64_t>(summed.source) * base.map.max_tokens + summed.token;
    send_carried(params, block.thread_idx(), index * base.num_topk, turn.tag, head);
}

/// Zeros behind a part, which go with its last packet.
template <typename Shared>
DEEPCOMM_DEVICE void clear_tail(const device::Block& block, Shared& shared) {
    using Spec = typename Shared::Spec;
    const int32_t word = Spec::kPartWords + block.thread_idx();
    if (word < Spec::kStagedWords) shared.row[word] = 0;
}

/// The part of this rank's own rows that a block keeps, if there is one: what it receives first.
template <typename Spec>
DEEPCOMM_DEVICE Summed kept_of(const LowLatencyParams& params, const device::Block& block) {
    return {params.comm.rank, block.block_idx() / Spec::kNumParts,
            block.block_idx() % Spec::kNumParts};
}

/// Whether a part is what its block receives first, which then keeps the sum of this rank's own rows.
template <typename Shared>
DEEPCOMM_DEVICE bool is_kept(const LowLatencyParams& params, const device::Block& block,
                             const Summed& summed) {
    return Shared::kKeepsSum && summed.source == params.comm.rank &&
           summed.token * Shared::Spec::kNumParts + summed.part < block.num_blocks();
}

/// A block's way through what is summed; most: tokens of any source.
template <typename Spec>
DEEPCOMM_DEVICE PairCursor summed_cursor(const device::Block& block, int32_t most) {
    return {most * Spec::kNumParts, block.block_idx()};
}

/// Where it is: tokens of the peers come first, which have the longer way, each part by part.
template <typename Spec>
DEEPCOMM_DEVICE Summed summed_at(const LowLatencyParams& params, const PairCursor& cursor) {
    return {cursor.rank(params, params.comm.rank + 1), cursor.item / Spec::kNumParts,
            cursor.item % Spec::kNumParts};
}

/// The parts of tokens that a block sums, one after the other.
template <typename Shared>
struct SummedWalk {
    using Spec = typename Shared::Spec;

    const LowLatencyCombineParams& params;
    Shared& shared;
    PairCursor cursor;
    bool has_ended = false;
    bool has_part = false;
    Summed summed = {0, 0, 0};  ///< the part to come
    Entry entry = {};           ///< of its token

    DEEPCOMM_DEVICE SummedWalk(const LowLatencyCombineParams& of, const device::Block& block,
                               Shared& in)
        : params(of), shared(in), cursor(summed_cursor<Spec>(block, most_tokens(of.base, in))) {}

    /// Comes to the next part, whose entry is not loaded yet.
    DEEPCOMM_DEVICE void advance(const device::Block& block) {
        has_part = false;
        while (!has_part && cursor.find(params.base)) {
            summed = summed_at<Spec>(params.base, cursor);
            cursor.item += block.num_blocks();
            has_part = takes_part() && !is_kept<Shared>(params.base, block, summed);
        }
        if (has_part || has_ended || !Shared::kKeepsSum) return;
        has_ended = true;  // but for what the block keeps
        summed = kept_of<Spec>(params.base, block);
        has_part = takes_part();
    }

    DEEPCOMM_DEVICE bool takes_part() const {
        return summed.token < shared.num_tokens[summed.source] &&
               !cut_sources(shared)[summed.source];
    }

    DEEPCOMM_DEVICE void load() {
        const device::Warp warp;
        const int32_t lane = warp.thread_idx();
        entry = has_ended ? Entry{shared.kept_entries[lane], shared.kept_weights[lane]}
                          : load_entry(params, warp, summed);
    }

    /// Begins with the part whose entry has been loaded early, if that was a good guess.
    DEEPCOMM_DEVICE void begin(const device::Block& block, const Summed& guess,
                               const Entry& early) {
        advance(block);
        entry = early;
        const bool is_guessed = summed.source == guess.source && summed.token == guess.token;
        if (has_part && !is_guessed) load();
    }
};

/// Whether the weights of a token are here, if they are awaited. False: leave.
template <typename Shared>
DEEPCOMM_DEVICE bool take_weights(const LowLatencyCombineParams& params, const device::Block& block,
                                  const LowLatencyTurn& turn, const Summed& summed,
                                  ExpertRows* rows, bool* is_here) {
    *is_here = true;
    if (Shared::Spec::kSendsVectors && params.source_weights == nullptr) return true;
    const Arrival arrival = await_weight(params, turn, summed, &rows->mine);
    // ORDER: the staged part is free again
    if (!block.sync_and(arrival != Arrival::kFailed)) return false;
    *is_here = !params.base.mask_late || block.sync_and(arrival == Arrival::kHere);
    if (!*is_here && block.is_leader()) {
        mask_late_peer<Shared::kHasNodes>(params.base, turn, summed.source);
    }
    return true;
}

/// Sums the block's parts, stages each and stores its packets, while the next one's terms are on their way.
/// False: leave.
template <typename Shared>
DEEPCOMM_DEVICE bool send_parts(const LowLatencyCombineParams& params, const device::Block& block,
                                const LowLatencyTurn& turn, SummedWalk<Shared>& walk,
                                Shared& shared) {
    using Spec = typename Shared::Spec;
    PartTerms<Spec> terms = {};
    Summed current = {0, 0, 0};
    Staged staged = Staged::kNothing;
    DEEPCOMM_NO_UNROLL
    while (true) {
        const bool has_part = walk.has_part;
        ExpertRows rows = {};
        if (has_part) {
            rows = rows_of<Spec>(params, walk.entry, walk.summed.part);
            terms.load(rows, 0, block.thread_idx());
        }
        if (staged != Staged::kNothing) {
            store_partial(params, block, turn, current, staged, shared);
        }
        if (!has_part) return true;
        const Staged next = walk.has_ended ? Staged::kToKeep : Staged::kToSend;
        current = walk.summed;
        walk.advance(block);
        if (walk.has_part) walk.load();
        staged = Staged::kNothing;
        // The first part's source may have been found to be absent since the walk began.
        if (cut_sources(shared)[current.source]) continue;
        bool is_here;
        if (!take_weights<Shared>(params, block, turn, current, &rows, &is_here)) return false;
        if (!is_here || rows.num == 0) continue;
        staged = next;
        sum_part(rows, params.apply_weights != 0, block, terms, shared);
        if constexpr (!Spec::kSendsVectors) {
            block.sync();  // ORDER: the staged part before its packets
        }
    }
}

/// What the block probably sums first: ranks have the same number of tokens, as a rule.
template <typename Spec>
DEEPCOMM_DEVICE Summed guess_summed(const LowLatencyParams& params, const device::Block& block) {
    PairCursor cursor = summed_cursor<Spec>(block, params.num_tokens);
    return cursor.find(params) ? summed_at<Spec>(params, cursor) : Summed{0, -1, 0};
}

/// Takes the turn and sends. The turn, the credits and what the record says, entries of the first token
/// included, are on their way together. False: leave.
template <typename Shared>
DEEPCOMM_DEVICE bool send_combine(const LowLatencyCombineParams& params, const device::Block& block,
                                  Shared& shared) {
    using Spec = typename Shared::Spec;
    const LowLatencyParams& base = params.base;
    const device::Warp warp;
    const bool is_refused = is_void(base);
    const Summed guess = guess_summed<Spec>(base, block);
    const Entry entry = guess.token >= 0 ? load_entry(params, warp, guess) : Entry{};
    EarlyTurn early(base, block);
    read_record(params, block, shared);
    if (Shared::kKeepsSum && warp.warp_idx() == 0) {
        const Summed own = kept_of<Spec>(base, block);
        if (own.token < base.num_tokens) {
            const Entry kept = load_entry(params, warp, own);
            shared.kept_entries[warp.thread_idx()] = kept.bits;
            shared.kept_weights[warp.thread_idx()] = kept.weight;
        }
    }
    early.load_credits(base);
    if (is_refused) return false;
    const bool has_peers = open_turn<Shared::kHasNodes>(base, Operation::kLowLatencyCombine, block,
                                                        early, &shared.peers);
    clear_tail(block, shared);
    // ORDER: what the record says, and the credits before all that is sent, to all
    if (!block.sync_and(has_peers)) return false;
    const LowLatencyTurn& turn = shared.peers.turn;
    find_cut_sources(base, block, shared);
    SummedWalk<Shared> walk(params, block, shared);
    walk.begin(block, guess, entry);
    const bool is_announced = Shared::kIsCarried && params.source_weights != nullptr;
    if (block.block_idx() == block.num_blocks() - 1 && !is_announced) {
        send_combine_headers(base, block, turn, shared);
    }
    bool has_ended;
    if (!exchange_weights(params, block, turn, shared, &has_ended)) return false;
    return has_ended || send_parts(params, block, turn, walk, shared);
}

}  // namespace deepcomm::kernels::low_latency
