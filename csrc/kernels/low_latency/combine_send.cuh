// SPDX-License-Identifier: Apache-2.0
// Role: for each part of a token that came here, a block sums those of the rows of its experts, rounds
// once and stores packets to the token's rank, or to the rank of this node that sums for it.
// PROTOCOLS.md: low_latency_combine.
#pragma once

#include "kernels/low_latency/combine_walk.cuh"
#include "kernels/low_latency/combine_weights.cuh"

namespace deepcomm::kernels::low_latency {

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

/// What a block looks up at a launch's begin, on its way together: whose turn it is, what the record says, and what
/// the block probably sums first, where the walk is then. False: there is no turn; leave.
template <typename Shared>
DEEPCOMM_DEVICE bool find_turn(const LowLatencyCombineParams& params, const device::Block& block,
                               SummedWalk<Shared>& walk, Shared& shared) {
    const LowLatencyParams& base = params.base;
    const device::Warp warp;
    const bool is_refused = is_void(base);
    EarlyTurn early(base, block);
    const bool goes_on = walk.load_guess();
    const Entry kept = kept_entry<Shared>(params, block);
    read_record(params, block, shared);
    if (Shared::kKeepsSum && warp.warp_idx() == 0) {
        shared.kept_entries[warp.thread_idx()] = kept.bits;
        shared.kept_weights[warp.thread_idx()] = kept.weight;
    }
    clear_tail(block, shared);
    early.load_credits(base);
    if (is_refused) return false;
    const bool has_peers = open_turn<Shared::kHasNodes>(base, Operation::kLowLatencyCombine, block,
                                                        early, &shared.peers);
    return has_peers && goes_on;
}

/// Once the block has met: sends the headers, and exchanges weights that are given at the sources. False: leave.
template <typename Shared>
DEEPCOMM_DEVICE bool open_send(const LowLatencyCombineParams& params, const device::Block& block,
                               bool* has_ended, Shared& shared) {
    const LowLatencyTurn& turn = shared.peers.turn;
    const bool is_announced = Shared::kIsCarried && params.source_weights != nullptr;
    if (block.block_idx() == block.num_blocks() - 1 && !is_announced) {
        send_combine_headers(params.base, block, turn, shared);
    }
    return exchange_weights(params, block, turn, shared, has_ended);
}

/// How sending goes on.
enum class Sending { kOn, kDone, kFailed };

/// Sums the block's parts, stages each and stores its packets, while the next one's terms are on their way.
template <typename Shared>
struct PartSender {
    using Spec = typename Shared::Spec;

    const LowLatencyCombineParams& params;
    const device::Block& block;
    Shared& shared;
    SummedWalk<Shared> walk;
    bool has_peers;
    Summed current = {0, 0, 0};
    Staged staged = Staged::kNothing;
    PartTerms<Spec> terms;

    DEEPCOMM_DEVICE PartSender(const LowLatencyCombineParams& of, const device::Block& by,
                               const Summed& guess, Shared& in)
        : params(of),
          block(by),
          shared(in),
          walk(of, guess, in),
          has_peers(find_turn(of, by, walk, in)) {}

    /// One part. The first, as far as it can be guessed, is summed by all warps but the last and before anybody
    /// knows whose turn it is: the last warp finds that meanwhile.
    DEEPCOMM_DEVICE Sending step(bool is_first) {
        const Summers summers = {block.thread_idx(),
                                 is_first ? Spec::kNumSummers : Spec::kNumThreads};
        const bool sums = walk.has_part && (!is_first || (sums_early() && !is_in_last_warp(block)));
        ExpertRows rows = {};
        if (walk.has_part) rows = rows_of<Spec>(params, walk.entry, walk.summed.part);
        if (sums) terms.load(rows, 0, summers);
        if (!is_first) {
            if (staged != Staged::kNothing) store();
            if (!walk.has_part) return Sending::kDone;
            bool is_there;
            if (!come_to_part(&rows, &is_there)) return Sending::kFailed;
            if (!is_there) return Sending::kOn;
        }
        if (sums) sum_part(rows, params.apply_weights != 0, summers, terms, shared);
        if (is_first) {
            const Sending sending = open(rows.num > 0);
            terms = {};  // whose registers are free until here
            return sending;
        }
        if constexpr (!Spec::kSendsVectors) {
            block.sync();  // ORDER: the staged part before its packets
        }
        return Sending::kOn;
    }

  private:
    /// A first part, before the turn is known.
    DEEPCOMM_DEVICE bool sums_early() const {
        return Spec::kSendsVectors && params.source_weights == nullptr;
    }

    DEEPCOMM_DEVICE void store() {
        store_partial(params, block, shared.peers.turn, current, staged, shared);
        staged = Staged::kNothing;
    }

    DEEPCOMM_DEVICE void advance() {
        current = walk.summed;
        walk.advance(block);
        if (walk.has_part) walk.load();
    }

    /// Whether the part whose terms are on their way is to be summed. False: leave.
    DEEPCOMM_DEVICE bool come_to_part(ExpertRows* rows, bool* is_there) {
        const Staged next = walk.has_ended ? Staged::kToKeep : Staged::kToSend;
        advance();
        *is_there = false;
        // The first part's source may have been found to be absent since the walk began.
        if (cut_sources(shared)[current.source]) return true;
        const LowLatencyTurn& turn = shared.peers.turn;
        if (!take_weights<Shared>(params, block, turn, current, rows, is_there)) return false;
        *is_there = *is_there && rows->num > 0;
        if (*is_there) staged = next;
        return true;
    }

    /// Begins to send, with the part that has been summed if that was a good guess.
    DEEPCOMM_DEVICE Sending open(bool has_rows) {
        // ORDER: what the record says, a first part, and the credits before all that is sent, to all
        if (!block.sync_and(has_peers)) return Sending::kFailed;
        find_cut_sources(params.base, block, shared);
        const bool is_guessed = walk.begin(block);
        if (is_guessed && has_rows && sums_early()) {
            staged = Staged::kToSend;
            current = walk.summed;
            store();
            advance();
        }
        bool has_ended;
        if (!open_send(params, block, &has_ended, shared)) return Sending::kFailed;
        return has_ended ? Sending::kDone : Sending::kOn;
    }
};

/// Takes the turn and sends; guess: what the block probably sums first. False: leave.
template <typename Shared>
DEEPCOMM_DEVICE bool send_combine(const LowLatencyCombineParams& params, const device::Block& block,
                                  const Summed& guess, Shared& shared) {
    PartSender<Shared> sender(params, block, guess, shared);
    Sending sending = Sending::kOn;
    bool is_first = true;
    // Where blocks have several parts, the first one by code of its own: larger, but faster.
    if constexpr (Shared::kKeepsSum) {
        sending = sender.step(true);
        is_first = false;
    }
    DEEPCOMM_NO_UNROLL
    while (sending == Sending::kOn) {
        sending = sender.step(is_first);
        is_first = false;
    }
    return sending == Sending::kDone;
}

}  // namespace deepcomm::kernels::low_latency
