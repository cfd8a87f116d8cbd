// SPDX-License-Identifier: Apache-2.0
// The header of a dispatch: one block tells every rank how many tokens come for each of its experts
// and which tokens they are; every block of a receiver reads the headers of all sources.
#pragma once

#include "kernels/low_latency/dispatch_spec.cuh"
#include "kernels/low_latency/peers.cuh"

namespace deepcomm::kernels::low_latency {

// ---- sending

/// The ids that a lane looks at for the header. A warp takes whole tokens, so that its lanes see
/// which ids of a token are alike; lanes behind the last whole one have none.
struct HeaderIds {
    int32_t token;   ///< of the first id
    int32_t stride;  ///< tokens from one id to the next
    int32_t k;
    int32_t row;  ///< of the token among those of the warp
    int32_t num_tokens;

    DEEPCOMM_DEVICE explicit HeaderIds(const LowLatencyDispatchParams& params,
                                       const device::Block& block) {
        const device::Warp warp;
        const int32_t num_topk = params.base.num_topk;
        const int32_t num_rows = device::kWarpSize / num_topk;
        row = warp.thread_idx() / num_topk;
        k = warp.thread_idx() % num_topk;
        stride = block.size() / device::kWarpSize * num_rows;
        num_tokens = params.base.num_tokens;
        token = row < num_rows ? warp.warp_idx() * num_rows + row : num_tokens;
    }

    DEEPCOMM_DEVICE IdRange range(int32_t num_topk, int32_t round) const {
        return {(token + round * stride) * num_topk + k, stride * num_topk, num_tokens * num_topk};
    }
};

constexpr int32_t kHeaderIdsAtOnce = 4;
using HeaderIdBatch = IdBatch<kHeaderIdsAtOnce>;

/// Fills this rank's status: its host raises InvalidArgument.
DEEPCOMM_DEVICE void report_id(const LowLatencyDispatchParams& params, layout::RefusalKind kind,
                               int32_t token, int32_t k, int64_t id) {
    if (!claim_status(params.base)) return;
    layout::LowLatencyStatus* status = params.base.status;
    status->kind = kind;
    status->operation = static_cast<int32_t>(Operation::kLowLatencyDispatch);
    status->culprit = params.base.comm.rank;
    status->token = token;
    status->topk = k;
    status->value = id;
    release_status(params.base);
}

template <typename Shared>
DEEPCOMM_DEVICE void clear_counts(const LowLatencyDispatchParams& params,
                                  const device::Block& block, Shared& shared) {
    const layout::LowLatencyLayout& map = params.base.map;
    DEEPCOMM_NO_UNROLL
    for (int32_t i = block.thread_idx(); i < params.num_experts; i += block.size()) {
        shared.counts[i] = 0;
    }
    DEEPCOMM_NO_UNROLL
    for (int32_t i = block.thread_idx(); i < map.num_ranks * map.token_words; i += block.size()) {
        shared.token_bits[i] = 0;
    }
    if (block.is_leader()) shared.refusal = 0;
}

/// Which of a lane's experts an earlier column of their token has, a bit each. By shuffles: a match of a
/// warp takes a step for every value in it.
DEEPCOMM_DEVICE uint32_t find_repeated(const HeaderIds& mine, int32_t num_topk,
                                       const int32_t (&experts)[kHeaderIdsAtOnce]) {
    const int32_t lane = device::Warp{}.thread_idx();
    uint32_t repeated = 0;
    DEEPCOMM_NO_UNROLL
    for (int32_t distance = 1; distance < num_topk; ++distance) {
        const bool has_earlier = mine.k >= distance;
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kHeaderIdsAtOnce; ++i) {
            const int32_t earlier =
                device::warp_shuffle(experts[i], has_earlier ? lane - distance : lane);
            if (has_earlier && earlier == experts[i] && earlier >= 0) repeated |= 1u << i;
        }
    }
    return repeated;
}

/// Says which of a lane's ids is wrong, the first if several are; a bit each for those that are no
/// experts, and for those that are repeated.
template <typename Shared>
DEEPCOMM_DEVICE void report_wrong(const LowLatencyDispatchParams& params, const HeaderIds& mine,
                                  int32_t round, uint32_t strange, uint32_t repeated,
                                  Shared& shared) {
    if ((strange | repeated) == 0) return;
    const int32_t first = device::lowest_bit(strange | repeated);
    const bool is_twice = (repeated >> first & 1u) != 0;
    const auto kind = is_twice ? layout::RefusalKind::kIdTwice : layout::RefusalKind::kIdRange;
    device::atom_or_relaxed_block(&shared.refusal, refusal_flag(kind));
    const int32_t token = mine.token + (round + first) * mine.stride;
    const int64_t index = static_cast<int64_t>(token) * params.base.num_topk + mine.k;
    report_id(params, kind, token, mine.k, id_at(params, index));
}

/// Counts ids of a lane and marks their tokens for their destinations.
template <typename Shared>
DEEPCOMM_DEVICE void count_ids(const LowLatencyDispatchParams& params, const HeaderIds& mine,
                               int32_t round, const HeaderIdBatch& batch, Shared& shared) {
    const layout::LowLatencyLayout& map = params.base.map;
    int32_t experts[kHeaderIdsAtOnce];
    uint32_t strange = 0;
    DEEPCOMM_UNROLL
    for (int32_t i = 0; i < kHeaderIdsAtOnce; ++i) {
        experts[i] = expert_of(params, batch.ids[i]);
        if (experts[i] < 0 && batch.ids[i] != -1) strange |= 1u << i;
    }
    const uint32_t repeated = find_repeated(mine, params.base.num_topk, experts);
    DEEPCOMM_UNROLL
    for (int32_t i = 0; i < kHeaderIdsAtOnce; ++i) {
        if (experts[i] < 0 || (repeated >> i & 1u) != 0) continue;
        const int32_t token = mine.token + (round + i) * mine.stride;
        device::red_add_relaxed_block(&shared.counts[experts[i]], 1u);
        const int32_t word = experts[i] / map.num_local_experts * map.token_words + token / 32;
        device::atom_or_relaxed_block(&shared.token_bits[word], 1u << token % 32);
    }
    report_wrong(params, mine, round, strange, repeated, shared);
}

/// Counts this rank's tokens by expert and marks them by destination; batch: the first ids.
template <typename Shared>
DEEPCOMM_DEVICE void count_tokens(const LowLatencyDispatchParams& params,
                                  const device::Block& block, const HeaderIds& mine,
                                  HeaderIdBatch batch, Shared& shared) {
    const int32_t num_rounds = (mine.num_tokens + mine.stride - 1) / mine.stride;
    DEEPCOMM_NO_UNROLL
    for (int32_t round = 0; round < num_rounds; round += kHeaderIdsAtOnce) {
        if (round > 0) batch.load(params, mine.range(params.base.num_topk, round));
        count_ids(params, mine, round, batch, shared);
    }
    block.sync();  // ORDER: all counts before they are read
}

/// Word of the header for dst.
template <typename Shared>
DEEPCOMM_DEVICE uint32_t header_word(const LowLatencyDispatchParams& params, const Shared& shared,
                                     int32_t dst, int32_t word) {
    const layout::LowLatencyLayout& map = params.base.map;
    if (word == 0) return params.base.signature;
    // A masked rank, beyond one that is not: nothing comes there from here.
    if (Shared::kHasNodes && shared.peers.masked[dst]) {
        return word == 1 ? refusal_flag(layout::RefusalKind::kAbsent) : 0;
    }
    if (word == 1) return static_cast<uint32_t>(params.base.num_tokens) | shared.refusal;
    const int32_t expert = word - static_cast<int32_t>(layout::kHeaderWords);
    if (expert < 0) return 0;
    if (expert < map.num_local_experts) return shared.counts[dst * map.num_local_experts + expert];
    const int32_t bits = expert - map.num_local_experts;
    return bits < map.token_words ? shared.token_bits[dst * map.token_words + bits] : 0;
}

/// Where the header for dst is stored.
struct HeaderPlace {
    int32_t rank;
    int64_t offset;
};

template <bool kHasNodes>
DEEPCOMM_DEVICE HeaderPlace header_place(const LowLatencyParams& params, const LowLatencyTurn& turn,
                                         int32_t dst) {
    const layout::LowLatencyLayout& map = params.map;
    const int32_t rank = next_rank_to<kHasNodes>(params, dst);
    if (rank == dst) return {rank, map.header_offset(turn.slot, params.comm.rank)};
    const int32_t local = dst % map.ranks_per_node;
    return {rank, map.rail_header_offset(turn.slot, params.node_idx, local)};
}

template <typename Shared>
DEEPCOMM_DEVICE void store_headers(const LowLatencyDispatchParams& params,
                                   const device::Block& block, const LowLatencyTurn& turn,
                                   const Shared& shared) {
    const layout::LowLatencyLayout& map = params.base.map;
    DEEPCOMM_NO_UNROLL
    for (int32_t i = block.thread_idx(); i < map.num_ranks * map.header_packets;
         i += block.size()) {
        const int32_t dst = i / map.header_packets, packet = i % map.header_packets;
        const HeaderPlace place = header_place<Shared::kHasNodes>(params.base, turn, dst);
        if (shared.peers.masked[place.rank]) continue;
        const int32_t word = packet * static_cast<int32_t>(layout::kPacketWords);
        device::st_relaxed_sys(
            packets_at(shared.peers.bases[place.rank], place.offset) + packet,
            {{header_word(params, shared, dst, word), header_word(params, shared, dst, word + 1),
              header_word(params, shared, dst, word + 2), turn.tag}});
    }
}

/// Finds the peers and sends the headers, for which everybody waits: ids, turn and credits are on
/// their way together. False: leave.
template <typename Shared>
DEEPCOMM_DEVICE bool send_headers(const LowLatencyDispatchParams& params,
                                  const device::Block& block, Shared& shared) {
    const HeaderIds mine(params, block);
    HeaderIdBatch batch;
    batch.load(params, mine.range(params.base.num_topk, 0));
    clear_counts(params, block, shared);
    const bool goes_on =
        open_turn<Shared::kHasNodes>(params.base, Operation::kLowLatencyDispatch, block,
                                     EarlyTurn(params.base, block), &shared.peers);
    if (!block.sync_and(goes_on)) return false;  // ORDER: the zeros and the credits, to all
    count_tokens(params, block, mine, batch, shared);
    store_headers(params, block, shared.peers.turn, shared);
    return true;
}

// ---- receiving

/// Waits for the first packet of each source, where one must know how long that takes or where a
/// late source is masked: the blocks then agree about who takes part. False: leave.
template <typename Shared>
DEEPCOMM_DEVICE bool await_sources(const LowLatencyParams& params, const device::Block& block,
                                   const LowLatencyTurn& turn, uint64_t start_ns, Shared& shared) {
    bool goes_on = true;
    DEEPCOMM_NO_UNROLL
    for (int32_t source = block.thread_idx(); source < params.map.num_ranks;
         source += block.size()) {
        const bool was_masked = shared.peers.masked[source] != 0;
        Arrival arrival = Arrival::kAbsent;
        int32_t late = source;
        if (!was_masked) {
            const int32_t peer = last_rank_from<Shared::kHasNodes>(params, source);
            const device::WaitSite site = {Operation::kLowLatencyDispatch, device::Role::kCount,
                                           peer, turn.slot};
            const int64_t offset = params.map.header_offset(turn.slot, source);
            Vec128 packet;
            arrival =
                wait_packet(params, site, packets_at(params.local, offset), turn.tag, &packet);
            add_wait(params, source, start_ns);
            if (arrival == Arrival::kAbsent) late = peer;
            if (Shared::kHasNodes && arrival == Arrival::kHere && tells_absence(packet)) {
                arrival = Arrival::kAbsent;
            }
        }
        goes_on = goes_on && arrival != Arrival::kFailed;
        if (!params.mask_late) continue;
        const bool is_present = takes_part(params, turn, source, arrival == Arrival::kHere);
        if (!is_present && !was_masked) mask_late_peer(params, late);
        shared.peers.masked[source] = is_present ? 0 : 1;
    }
    return block.sync_and(goes_on);  // ORDER: the decisions before the block acts on them
}

/// Puts one word of a source's header where it belongs.
template <typename Shared>
DEEPCOMM_DEVICE void take_header_word(const LowLatencyDispatchParams& params, Shared& shared,
                                      int32_t source, int32_t word, uint32_t value) {
    const layout::LowLatencyLayout& map = params.base.map;
    const int32_t expert = word - static_cast<int32_t>(layout::kHeaderWords);
    if (word == 1) shared.num_tokens[source] = static_cast<int32_t>(value & kTokenMask);
    if (expert < 0) return;
    if (expert < map.num_local_experts) {
        shared.counts[source * map.num_local_experts + expert] = value;
    } else if (expert - map.num_local_experts < map.token_words) {
        shared.token_bits[source * map.token_words + expert - map.num_local_experts] = value;
    }
}

/// Reads the headers of all sources. False: leave.
template <typename Shared>
DEEPCOMM_DEVICE bool receive_headers(const LowLatencyDispatchParams& params,
                                     const device::Block& block, const LowLatencyTurn& turn,
                                     Shared& shared) {
    const LowLatencyParams& base = params.base;
    const uint64_t start_ns = start_of_waits(base, block);
    block.sync();  // ORDER: the peers are found, and what was sent from shared memory is read
    if constexpr (Shared::kHasNodes) {
        mask_cut_sources(base, block, &shared.peers);
        block.sync();  // ORDER: who is masked, to all
    }
    bool goes_on = true;
    if (start_ns != 0 || base.mask_late)
        goes_on = await_sources(base, block, turn, start_ns, shared);
    if (!goes_on) return false;
    const int32_t num_packets = base.map.header_packets;
    DEEPCOMM_NO_UNROLL
    for (int32_t i = block.thread_idx(); i < base.map.num_ranks * num_packets; i += block.size()) {
        const int32_t source = i / num_packets, index = i % num_packets;
        Vec128 packet = {{index == 0 ? base.signature : 0, 0, 0, 0}};  // masked: nothing comes
        if (!shared.peers.masked[source]) {
            const device::WaitSite site = {Operation::kLowLatencyDispatch, device::Role::kCount,
                                           last_rank_from<Shared::kHasNodes>(base, source),
                                           turn.slot};
            const int64_t offset = base.map.header_offset(turn.slot, source);
            const Vec128* address = packets_at(base.local, offset) + index;
            if (Shared::kHasNodes && index == 0) {
                goes_on = must_take_part(base, site, address, turn.tag, &packet) && goes_on;
            } else {
                goes_on = must_arrive(base, site, address, turn.tag, &packet) && goes_on;
            }
        }
        if (index == 0) note_header(base, &shared.refusals, source, packet);
        const int32_t word = index * static_cast<int32_t>(layout::kPacketWords);
        DEEPCOMM_UNROLL
        for (int32_t part = 0; part < layout::kPacketWords; ++part) {
            take_header_word(params, shared, source, word + part, packet.words[part]);
        }
    }
    return block.sync_and(goes_on);  // ORDER: all words before they are used
}

}  // namespace deepcomm::kernels::low_latency
