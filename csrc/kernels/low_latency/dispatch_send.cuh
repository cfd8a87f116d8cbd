// SPDX-License-Identifier: Apache-2.0
// Role: a block sends tokens. It counts where the token's copies will lie and casts the row into
// shared memory, while its last warp finds turn, credits and destinations, and then stores
// packets to every destination at once. PROTOCOLS.md: low_latency_dispatch.
#pragma once

#include "kernels/low_latency/dispatch_input.cuh"

namespace deepcomm::kernels::low_latency {

/// The last warp: writes the handle's copies.
template <typename Shared>
DEEPCOMM_DEVICE void write_handle(const LowLatencyDispatchParams& params, const device::Warp& warp,
                                  const TokenInput<Shared>& input) {
    const int32_t k = warp.thread_idx();
    if (k >= params.base.num_topk) return;
    const int64_t index = static_cast<int64_t>(input.token) * params.base.num_topk + k;
    params.handle_topk_idx[index] = expert_of(params, input.own.ids[0]);
    if (params.topk_weights != nullptr) params.handle_topk_weights[index] = input.weight;
}

/// The last warp: destinations of the token, in the order of their first columns. The rank of another
/// node's rail is one for all experts there, which it counts from its own first one; this rank is none of
/// a row that is kept.
template <typename Shared>
DEEPCOMM_DEVICE void find_destinations(const LowLatencyDispatchParams& params,
                                       const device::Warp& warp, const TokenInput<Shared>& input,
                                       bool is_kept, Shared& shared) {
    const int32_t k = warp.thread_idx();
    const int32_t expert = expert_of(params, input.own.ids[0]);
    const Divisor num_local = params.base.map.num_local_experts;
    const int32_t owner = expert < 0 ? -1 : expert / num_local;
    const bool is_sent =
        owner >= 0 && !is_cut_to<Shared::kHasNodes>(params.base, shared.peers, owner);
    const int32_t dst = is_sent ? next_rank_to<Shared::kHasNodes>(params.base, owner) : -1;
    const bool stays = is_kept && is_sent && dst == params.base.comm.rank;
    const uint32_t alike = device::warp_match(is_sent ? static_cast<uint32_t>(dst) : kNoExpert);
    const int32_t first = device::lowest_bit(alike);
    const bool is_first = is_sent && !stays && first == k;
    const uint32_t firsts = device::warp_ballot(is_first);
    const int32_t dst_idx = stays ? kKeptRow : device::popcount(firsts & ((1u << first) - 1u));
    if (is_first) shared.destinations[dst_idx] = dst;
    if (k < params.base.num_topk) {
        shared.entries[k] = {is_sent ? dst_idx : -1, is_sent ? expert - dst * num_local : 0,
                             input.weight};
    }
    if (warp.is_leader()) shared.num_destinations = device::popcount(firsts);
}

constexpr int32_t kCountBits = 8;  ///< of a column: a warp compares at most 160 ids with it at once
static_assert(kColumnsAtOnce * kCountBits == 32, "one sum of a warp for all of them");

/// How many of the lanes' experts are those in columns begin, begin + 1, ...: kCountBits each; mine: the expert
/// in a lane's column.
template <int32_t kCount>
DEEPCOMM_DEVICE uint32_t count_columns(const int32_t (&experts)[kCount], int32_t mine,
                                       int32_t begin) {
    static_assert(kCount * device::kWarpSize < 1 << kCountBits, "counts of a column");
    uint32_t counts = 0;
    DEEPCOMM_UNROLL
    for (int32_t i = 0; i < kColumnsAtOnce; ++i) {
        const int32_t expert = device::warp_shuffle(mine, begin + i);
        DEEPCOMM_UNROLL
        for (int32_t j = 0; j < kCount; ++j) {
            if (experts[j] == expert) counts += 1u << i * kCountBits;
        }
    }
    return device::warp_sum(counts);
}

/// How many tokens of this rank before this one have each of its experts, of those that a warp looks at. Each of
/// the ids before is read once and compared with all of the token's.
template <typename Shared>
DEEPCOMM_DEVICE void count_positions(const LowLatencyDispatchParams& params,
                                     const device::Block& block, TokenInput<Shared>& input,
                                     Shared& shared) {
    constexpr int32_t kCount = TokenInput<Shared>::kEarlier;
    const int32_t num_topk = params.base.num_topk, num_ids = input.token * num_topk;
    const int32_t mine = expert_of(params, input.own.ids[0]);
    const device::Warp warp;
    const int32_t lane = warp.thread_idx();
    uint32_t num_before = 0;  // ids of this warp that are the lane's expert
    DEEPCOMM_NO_UNROLL
    for (int32_t round = 0;
         round * Shared::Spec::kStagers + warp.warp_idx() * warp.size() < num_ids;
         round += kCount) {
        if (round > 0) input.earlier.load(params, input.earlier_ids(params, block, round));
        DEEPCOMM_NO_UNROLL
        for (int32_t begin = 0; begin < num_topk; begin += kColumnsAtOnce) {
            const uint32_t counts = count_columns(input.earlier.ids, mine, begin);
            const int32_t column = lane - begin;
            if (column < 0 || column >= kColumnsAtOnce) continue;
            num_before += counts >> column * kCountBits & ((1u << kCountBits) - 1u);
        }
    }
    if (lane < num_topk) shared.counted[warp.warp_idx()][lane] = num_before;
}

/// Whether an entry is an expert of that destination itself, not of a rank beyond it.
template <typename Shared>
DEEPCOMM_DEVICE bool is_entry_of(const LowLatencyParams& params, const LowLatencyEntry& entry,
                                 int32_t dst_idx) {
    const bool is_beyond =
        Shared::kHasNodes &&
        (entry.local_expert < 0 || entry.local_expert >= params.map.num_local_experts);
    return entry.dst_idx == dst_idx && !is_beyond;
}

/// Tells the ranks of other nodes' rails where a token goes in the whole node.
template <typename Shared>
DEEPCOMM_DEVICE void store_rail_heads(const LowLatencyDispatchParams& params,
                                      const device::Block& block, const LowLatencyTurn& turn,
                                      int32_t token, const Shared& shared) {
    const LowLatencyParams& base = params.base;
    const Divisor num_topk = base.num_topk;
    const int32_t own_first = base.rail_idx * base.map.num_local_experts;
    const int64_t offset = base.map.rail_head_offset(turn.slot, base.node_idx, token);
    DEEPCOMM_NO_UNROLL
    for (int32_t i = block.thread_idx(); i < shared.num_destinations * num_topk;
         i += block.size()) {
        const int32_t dst_idx = i / num_topk, k = i % num_topk;
        const int32_t dst = shared.destinations[dst_idx];
        if (dst / base.map.ranks_per_node == base.node_idx) continue;
        const LowLatencyEntry& entry = shared.entries[k];
        const bool is_there = entry.dst_idx == dst_idx;
        const int32_t expert = own_first + entry.local_expert;
        device::st_relaxed_sys(
            packets_at(shared.peers.bases[dst], offset) + k,
            {{is_there ? static_cast<uint32_t>(expert) : kNoExpert, position_of(shared, k),
              device::float_bits(entry.weight), turn.tag}});
    }
}

/// Stores the staged row and what its destinations need to place it.
template <typename Shared>
DEEPCOMM_DEVICE void store_row(const LowLatencyDispatchParams& params, const device::Block& block,
                               const LowLatencyTurn& turn, int32_t token, const Shared& shared) {
    using Spec = typename Shared::Spec;
    const Divisor num_topk = params.base.num_topk;
    const int64_t offset = params.base.map.row_offset(turn.slot, params.base.comm.rank, token);
    const int32_t num_destinations = shared.num_destinations;
    DEEPCOMM_NO_UNROLL
    for (int32_t i = block.thread_idx(); i < num_destinations * num_topk; i += block.size()) {
        const int32_t dst_idx = i / num_topk, k = i % num_topk;
        const LowLatencyEntry& entry = shared.entries[k];
        const bool is_there = is_entry_of<Shared>(params.base, entry, dst_idx);
        const uint32_t expert = is_there ? static_cast<uint32_t>(entry.local_expert) : kNoExpert;
        unsigned char* base = shared.peers.bases[shared.destinations[dst_idx]];
        device::st_relaxed_sys(
            packets_at(base, offset) + k,
            {{expert, position_of(shared, k), device::float_bits(entry.weight), turn.tag}});
    }
    constexpr int32_t kCount = Spec::kPacketsOfThread < 3 ? Spec::kPacketsOfThread : 3;
    DEEPCOMM_NO_UNROLL
    for (int32_t first = block.thread_idx(); first < Spec::kPackets;
         first += kCount * Spec::kNumThreads) {
        PacketBatch<typename Spec::Format, kCount> batch;
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kCount; ++i) {
            const int32_t index = first + i * Spec::kNumThreads;
            if (index >= Spec::kPackets) continue;
            batch.packets[i] = packet_of<Spec>(shared.row, index, turn.tag);
        }
        DEEPCOMM_NO_UNROLL
        for (int32_t dst_idx = 0; dst_idx < num_destinations; ++dst_idx) {
            unsigned char* base = shared.peers.bases[shared.destinations[dst_idx]];
            Vec128* heads = packets_at(base, offset);
            store_packets<Spec>(batch, first, payload_of(params.base, heads));
        }
    }
}

/// Stages the row; the vectors that have been loaded first.
template <typename Shared>
DEEPCOMM_DEVICE void stage_row(const LowLatencyDispatchParams& params, const device::Block& block,
                               TokenInput<Shared>& input, Shared& shared) {
    using Input = RowInput<Shared>;
    const unsigned char* row = params.x + input.token * params.x_stride;
    input.row.stage(block.thread_idx(), shared);
    DEEPCOMM_NO_UNROLL
    for (int32_t first = Input::kCount; first < Input::kAll; first += Input::kCount) {
        const int32_t vector = block.thread_idx() + first * Shared::Spec::kStagers;
        input.row.load(row, vector);
        input.row.stage(vector, shared);
    }
    stage_tail(params, block, input.token, shared);
}

/// One token, whose input is on its way; then that of the block's next one is. Only the last warp needs the peers
/// before the block meets, and has opened them. is_last: of the block; has_peers: they are open, as far as this
/// thread knows. False: leave.
template <typename Shared>
DEEPCOMM_DEVICE bool send_token(const LowLatencyDispatchParams& params, const device::Block& block,
                                TokenInput<Shared>& input, bool is_last, bool has_peers,
                                Shared& shared) {
    const device::Warp warp;
    const int32_t token = input.token;
    if (is_in_last_warp(block)) {
        find_destinations(params, warp, input, keeps_row<Shared>(block, token), shared);
        write_handle(params, warp, input);
    } else {
        count_positions(params, block, input, shared);
        stage_row(params, block, input, shared);
    }
    if (!is_last) input.load(params, block, token - block.num_blocks());
    // ORDER: turn, credits, destinations, counts and the staged row, to all
    if (!block.sync_and(has_peers)) return false;
    const LowLatencyTurn& turn = shared.peers.turn;
    store_row(params, block, turn, token, shared);
    if constexpr (Shared::kHasNodes) store_rail_heads(params, block, turn, token, shared);
    if (!is_last) {
        block.sync();  // ORDER: the token has left shared memory before the next comes there
    }
    return true;
}

/// What the combine must know of the send phase.
template <typename Shared>
DEEPCOMM_DEVICE void record_send(const LowLatencyParams& params, const device::Block& block,
                                 const LowLatencyTurn& turn, const Shared& shared) {
    int32_t* connected = params.record + params.record_map.connected;
    DEEPCOMM_NO_UNROLL
    for (int32_t peer = block.thread_idx(); peer < params.map.num_ranks; peer += block.size()) {
        connected[peer] = is_cut_to<Shared::kHasNodes>(params, shared.peers, peer) ? 0 : 1;
    }
    if (block.is_leader()) params.record[params.record_map.tag] = static_cast<int32_t>(turn.tag);
}

/// How many tokens a block sends.
DEEPCOMM_DEVICE int32_t num_sent(const LowLatencyParams& params, const device::Block& block) {
    int32_t num = 0, token = block.block_idx();
    DEEPCOMM_NO_UNROLL
    for (; token < params.num_tokens; token += block.num_blocks()) ++num;
    return num;
}

/// Takes the turn and sends, a block's last token first: its first one is what the block delivers first. The
/// last block sends the headers, before its tokens. What tokens and headers need is on its way beside the turn.
/// False: leave.
template <typename Shared>
DEEPCOMM_DEVICE bool send_dispatch(const LowLatencyDispatchParams& params,
                                   const device::Block& block, Shared& shared) {
    const LowLatencyParams& base = params.base;
    const bool sends_headers = block.block_idx() == block.num_blocks() - 1;
    EarlyTurn early(base, block);
    if (sends_headers && !is_in_last_warp(block)) count_tokens(params, shared);
    int32_t round = num_sent(base, block) - 1;
    TokenInput<Shared> input;
    if (round >= 0) input.load(params, block, block.block_idx() + round * block.num_blocks());
    early.load_credits(base);
    const bool has_peers = open_turn<Shared::kHasNodes>(base, Operation::kLowLatencyDispatch, block,
                                                        early, &shared.peers);
    if (sends_headers) {
        if (!block.sync_and(has_peers)) return false;  // ORDER: counts, turn and credits, to all
        store_headers(params, block, shared);
        record_send(base, block, shared.peers.turn, shared);
    }
    if (round < 0) return block.sync_and(has_peers);  // as one
    DEEPCOMM_NO_UNROLL
    for (; round >= 0; --round) {
        if (!send_token(params, block, input, round == 0, has_peers, shared)) return false;
    }
    return true;
}

}  // namespace deepcomm::kernels::low_latency
