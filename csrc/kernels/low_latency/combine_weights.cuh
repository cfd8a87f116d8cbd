// SPDX-License-Identifier: Apache-2.0
// The first message of a combine whose weights are given at the sources: each token's weights go to the
// ranks of its experts, which know by then who takes part. PROTOCOLS.md: low_latency_combine.
#pragma once

#include "kernels/low_latency/combine_spec.cuh"

namespace deepcomm::kernels::low_latency {

/// Rank of an expert, -1 where there is none or it takes no part.
template <typename Shared>
DEEPCOMM_DEVICE int32_t rank_of_expert(const LowLatencyCombineParams& params, const Shared& shared,
                                       int32_t expert) {
    if (expert < 0) return -1;
    const int32_t rank = expert / params.base.map.num_local_experts;
    const bool is_cut = is_cut_to<Shared::kHasNodes>(params.base, shared.peers, rank);
    return is_cut || !shared.connected[rank] ? -1 : rank;
}

/// The rank to store to what is meant for the rank of an expert; -1 as above.
template <typename Shared>
DEEPCOMM_DEVICE int32_t target_of_expert(const LowLatencyCombineParams& params,
                                         const Shared& shared, int32_t expert) {
    const int32_t rank = rank_of_expert(params, shared, expert);
    return rank < 0 ? -1 : next_rank_to<Shared::kHasNodes>(params.base, rank);
}

/// Sends the weights of this rank's tokens to each of their ranks; all blocks share the work.
template <typename Shared>
DEEPCOMM_DEVICE void send_weights(const LowLatencyCombineParams& params, const device::Block& block,
                                  const LowLatencyTurn& turn, const Shared& shared) {
    const LowLatencyParams& base = params.base;
    const Divisor num_topk = base.num_topk;
    const auto num_packets = static_cast<int32_t>(layout::packets_of(num_topk));
    const int32_t stride = block.num_blocks() * block.size();
    DEEPCOMM_NO_UNROLL
    for (int32_t i = block.block_idx() * block.size() + block.thread_idx();
         i < base.num_tokens * num_topk * num_packets; i += stride) {
        const int32_t packet = i % num_packets, k = i / num_packets % num_topk;
        const int32_t token = i / num_packets / num_topk;
        const int64_t first = static_cast<int64_t>(token) * num_topk;
        const int32_t dst = target_of_expert(params, shared, params.topk_idx[first + k]);
        bool is_first = dst >= 0;
        DEEPCOMM_NO_UNROLL
        for (int32_t before = 0; before < k && is_first; ++before) {
            const int32_t expert = params.topk_idx[first + before];
            is_first = target_of_expert(params, shared, expert) != dst;
        }
        if (!is_first) continue;
        uint32_t words[layout::kPacketWords];
        DEEPCOMM_UNROLL
        for (int32_t part = 0; part < layout::kPacketWords; ++part) {
            const auto column = static_cast<int32_t>(packet * layout::kPacketWords) + part;
            words[part] =
                column < num_topk ? device::float_bits(params.source_weights[first + column]) : 0;
        }
        const int64_t offset = base.map.weights_offset(turn.slot, base.comm.rank, token);
        device::st_relaxed_sys(packets_at(shared.peers.bases[dst], offset) + packet,
                               {{words[0], words[1], words[2], turn.tag}});
    }
}

/// Passes on, over several nodes, the headers that come along the rail; nothing more is kept of them.
template <typename Shared>
DEEPCOMM_DEVICE bool forward_combine_headers(const LowLatencyParams& params,
                                             const device::Block& block, const LowLatencyTurn& turn,
                                             Shared& shared) {
    const RailHeaders headers = {Operation::kLowLatencyCombine, turn, shared.refusals};
    const bool goes_on =
        await_rail(params, block, headers, &shared.peers, [](int32_t, const Vec128&) {});
    if (!goes_on) return false;
    find_cut_sources(params, block, shared);
    return pass_on_headers(params, block, headers, shared.peers,
                           [](int32_t, int32_t, const Vec128&) {});
}

/// Local ranks of this node that a token of a rail's source has gone to, by its columns.
DEEPCOMM_DEVICE const int32_t* routes_of(const LowLatencyParams& params, int32_t source,
                                         int32_t token) {
    const int64_t node = source / params.map.ranks_per_node;
    return params.record + params.record_map.routes +
           (node * params.map.max_tokens + token) * params.num_topk;
}

/// Stores a packet of a token's weights to each rank of this node that the token has gone to.
template <typename Shared>
DEEPCOMM_DEVICE void pass_on_weights(const LowLatencyParams& params, const int32_t* routes,
                                     int64_t offset, const Vec128& packet, const Shared& shared) {
    DEEPCOMM_NO_UNROLL
    for (int32_t k = 0; k < params.num_topk; ++k) {
        const int32_t local = routes[k];
        if (local < 0 || local == params.rail_idx) continue;
        const int32_t dst = node_rank(params, local);
        if (shared.peers.masked[dst]) continue;
        device::st_relaxed_sys(packets_at(shared.peers.bases[dst], offset), packet);
    }
}

/// Whether a token has gone to any rank of this node that takes part: its weights then come.
DEEPCOMM_DEVICE bool has_routes(const LowLatencyParams& params, const int32_t* routes,
                                const Peers& peers) {
    for (int32_t k = 0; k < params.num_topk; ++k) {
        if (routes[k] >= 0 && !peers.masked[node_rank(params, routes[k])]) return true;
    }
    return false;
}

/// Passes on, over several nodes, the weights that come along the rail: a packet a thread. False: leave.
template <typename Shared>
DEEPCOMM_DEVICE bool forward_weights(const LowLatencyParams& params, const device::Block& block,
                                     const LowLatencyTurn& turn, Shared& shared) {
    const auto num_packets = static_cast<int32_t>(layout::packets_of(params.num_topk));
    const int32_t num_items = params.map.max_tokens * num_packets;
    const int32_t stride = block.num_blocks() * block.size();
    Arrival arrival = Arrival::kHere;
    int32_t late = layout::kNoPeer;
    DEEPCOMM_NO_UNROLL
    for (int32_t i = block.block_idx() * block.size() + block.thread_idx();
         i < num_items * (num_nodes(params) - 1); i += stride) {
        const int32_t source = rail_rank(params, other_node(params, i / num_items));
        const int32_t token = i % num_items / num_packets, packet_idx = i % num_packets;
        const bool is_there = token < shared.num_tokens[source] && !cut_sources(shared)[source];
        const int32_t* routes = routes_of(params, source, token);
        if (!is_there || source == late || !has_routes(params, routes, shared.peers)) continue;
        const device::WaitSite site = {Operation::kLowLatencyCombine, device::Role::kForward,
                                       source, token};
        const int64_t offset =
            params.map.weights_offset(turn.slot, source, token) + packet_idx * layout::kPacketBytes;
        Vec128 packet{};
        arrival = wait_packet(params, site, packets_at(params.local, offset), turn.tag, &packet);
        if (arrival == Arrival::kFailed) break;
        if (arrival == Arrival::kAbsent) {
            mask_late_peer<true>(params, turn, source);
            late = source;
            continue;
        }
        pass_on_weights(params, routes, offset, packet, shared);
    }
    return block.sync_and(arrival != Arrival::kFailed);  // as one
}

/// Weights given at the sources go first; who ends the operation is then known. False: leave.
template <typename Shared>
DEEPCOMM_DEVICE bool exchange_weights(const LowLatencyCombineParams& params,
                                      const device::Block& block, const LowLatencyTurn& turn,
                                      Shared& shared, bool* has_ended) {
    *has_ended = false;
    if (params.source_weights == nullptr) return true;
    if constexpr (!Shared::kIsCarried) send_weights(params, block, turn, shared);
    block.sync();  // ORDER: who is masked has been read, and may change
    if constexpr (Shared::kHasNodes) {
        if (!forward_combine_headers(params.base, block, turn, shared)) return false;
    }
    const CombineHeaders headers(params.base, turn, 0);
    if (!receive_combine_headers(params.base, block, headers, {}, shared)) return false;
    *has_ended = find_culprit(params.base, shared.refusals) != layout::kNoPeer;
    if constexpr (Shared::kHasNodes) {
        if (!*has_ended) return forward_weights(params.base, block, turn, shared);
    }
    return true;
}

}  // namespace deepcomm::kernels::low_latency
