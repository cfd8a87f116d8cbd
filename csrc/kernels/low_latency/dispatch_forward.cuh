// SPDX-License-Identifier: Apache-2.0
// Role, over several nodes, at the head of the receive phase: takes what ranks of other nodes have sent
// along this rank's rail, and stores it to the ranks of this node as those would have. PROTOCOLS.md:
// low latency over nodes.
#pragma once

#include "kernels/low_latency/dispatch_receive.cuh"
#include "kernels/low_latency/forward.cuh"

namespace deepcomm::kernels::low_latency {

/// Whether a token of a rail source goes to the local-th rank of this node.
template <typename Shared>
DEEPCOMM_DEVICE bool goes_to(const LowLatencyParams& params, const Shared& shared, const Pair& pair,
                             int32_t local) {
    const int32_t node = pair.source / params.map.ranks_per_node;
    const int32_t rank = node * params.map.ranks_per_node + local;
    const int32_t word = rank * params.map.token_words + pair.token / 32;
    return (shared.token_bits[word] >> pair.token % 32 & 1u) != 0;
}

/// Passes on the headers of the rail's sources, and keeps what they say of their tokens: at the source
/// how many there are, at the rank of its node with a destination's index which of them go there.
/// False: leave.
template <typename Shared>
DEEPCOMM_DEVICE bool forward_headers(const LowLatencyDispatchParams& params,
                                     const device::Block& block, const LowLatencyTurn& turn,
                                     Shared& shared) {
    const LowLatencyParams& base = params.base;
    const RailHeaders headers = {Operation::kLowLatencyDispatch, turn, shared.refusals};
    const bool goes_on =
        await_rail(base, block, headers, &shared.peers, [&](int32_t source, const Vec128& packet) {
            const uint32_t num_tokens = packet.words[1] & kTokenMask;
            shared.num_tokens[source] = static_cast<int32_t>(num_tokens);
        });
    if (!goes_on) return false;
    return pass_on_headers(
        base, block, headers, shared.peers, [&](int32_t rank, int32_t index, const Vec128& packet) {
            const int32_t first =
                static_cast<int32_t>(layout::kHeaderWords) + base.map.num_local_experts;
            DEEPCOMM_UNROLL
            for (int32_t part = 0; part < layout::kPacketWords; ++part) {
                const int32_t word =
                    index * static_cast<int32_t>(layout::kPacketWords) + part - first;
                if (word < 0 || word >= base.map.token_words) continue;
                shared.token_bits[rank * base.map.token_words + word] = packet.words[part];
            }
        });
}

/// One block's way through the tokens of the rail's sources. Says on the way which go nowhere here.
template <typename Shared>
struct RailWalk {
    const LowLatencyParams& params;
    const Shared& shared;
    int32_t most;  ///< tokens of any of these sources
    int32_t next;
    int32_t lost_source = layout::kNoPeer;

    DEEPCOMM_DEVICE int32_t* routes_of(const Pair& pair) const {
        const int64_t node = pair.source / params.map.ranks_per_node;
        return params.record + params.record_map.routes +
               (node * params.map.max_tokens + pair.token) * params.num_topk;
    }

    DEEPCOMM_DEVICE bool goes_anywhere(const Pair& pair) const {
        bool is_here = false;
        DEEPCOMM_NO_UNROLL
        for (int32_t local = 0; local < params.map.ranks_per_node; ++local) {
            is_here = is_here || goes_to(params, shared, pair, local);
        }
        return is_here;
    }

    /// False: none is left.
    DEEPCOMM_DEVICE bool advance(const device::Block& block, Pair* pair) {
        const int32_t num_pairs = most * (num_nodes(params) - 1);
        DEEPCOMM_NO_UNROLL
        for (; next < num_pairs; next += block.num_blocks()) {
            const int32_t source = rail_rank(params, other_node(params, next / most));
            *pair = {source, next % most};
            if (shared.peers.masked[source]) continue;
            if (shared.refusals.kinds[source] != layout::RefusalKind::kNone) continue;
            if (pair->token >= shared.num_tokens[source]) continue;
            if (source != lost_source && goes_anywhere(*pair)) {
                next += block.num_blocks();
                return true;
            }
            if (block.thread_idx() < params.num_topk) routes_of(*pair)[block.thread_idx()] = -1;
        }
        return false;
    }
};

/// The last warp: waits for a token's head, tells each rank of the node its part, and keeps for combines
/// which ranks these are.
template <typename Shared>
DEEPCOMM_DEVICE Arrival forward_head(const LowLatencyDispatchParams& params,
                                     const LowLatencyTurn& turn, const device::WaitSite& site,
                                     const Pair& pair, int32_t* routes, const Shared& shared) {
    const LowLatencyParams& base = params.base;
    const device::Warp warp;
    const int32_t k = warp.thread_idx();
    if (k >= base.num_topk) return Arrival::kHere;
    const int32_t node = pair.source / base.map.ranks_per_node;
    const int64_t from = base.map.rail_head_offset(turn.slot, node, pair.token);
    const int64_t to = base.map.row_offset(turn.slot, pair.source, pair.token);
    Vec128 head{};
    const Arrival arrival =
        wait_packet(base, site, packets_at(base.local, from) + k, turn.tag, &head);
    const bool is_here = arrival == Arrival::kHere && head.words[0] != kNoExpert;
    const int32_t num_local = base.map.num_local_experts;
    const int32_t expert = is_here ? static_cast<int32_t>(head.words[0]) : -1;
    const int32_t owner = is_here ? expert / num_local : -1;
    routes[k] = owner;
    if (arrival != Arrival::kHere) return arrival;
    DEEPCOMM_NO_UNROLL
    for (int32_t local = 0; local < base.map.ranks_per_node; ++local) {
        const int32_t dst = node_rank(base, local);
        if (local == base.rail_idx || shared.peers.masked[dst]) continue;
        if (!goes_to(base, shared, pair, local)) continue;
        const uint32_t word =
            owner == local ? static_cast<uint32_t>(expert - local * num_local) : kNoExpert;
        device::st_relaxed_sys(packets_at(shared.peers.bases[dst], to) + k,
                               {{word, head.words[1], head.words[2], turn.tag}});
    }
    return arrival;
}

/// Stores payload packets that have arrived to each rank of the node that the token goes to.
template <typename Shared, int kCount>
DEEPCOMM_DEVICE void forward_packets(
    const LowLatencyParams& params, const LowLatencyTurn& turn, const Pair& pair,
    const PacketBatch<typename Shared::Spec::Format, kCount>& batch, int32_t first,
    const Shared& shared) {
    const int64_t offset = params.map.row_offset(turn.slot, pair.source, pair.token);
    DEEPCOMM_NO_UNROLL
    for (int32_t local = 0; local < params.map.ranks_per_node; ++local) {
        const int32_t dst = node_rank(params, local);
        if (local == params.rail_idx || shared.peers.masked[dst]) continue;
        if (!goes_to(params, shared, pair, local)) continue;
        Vec128* packets = payload_of(params, packets_at(shared.peers.bases[dst], offset));
        store_packets<typename Shared::Spec>(batch, first, packets);
    }
}

/// Waits for one row and passes it on; its payload is where this rank itself receives it.
template <typename Shared>
DEEPCOMM_DEVICE Arrival forward_row(const LowLatencyDispatchParams& params,
                                    const device::Block& block, const LowLatencyTurn& turn,
                                    const Pair& pair, int32_t* routes, const Shared& shared) {
    using Spec = typename Shared::Spec;
    constexpr int32_t kAll = RowPackets<Shared>::kAll, kCount = kAll < 5 ? kAll : 5;
    const LowLatencyParams& base = params.base;
    const device::WaitSite site = {Operation::kLowLatencyDispatch, device::Role::kForward,
                                   pair.source, pair.token};
    const int64_t offset = base.map.row_offset(turn.slot, pair.source, pair.token);
    const PacketRange payload = {payload_of(base, packets_at(base.local, offset)),
                                 Spec::kNumThreads, Spec::kPackets};
    Arrival arrival = Arrival::kHere;
    DEEPCOMM_NO_UNROLL
    for (int32_t i = 0; i < kAll && arrival == Arrival::kHere; i += kCount) {
        const int32_t first = block.thread_idx() + i * Spec::kNumThreads;
        PacketBatch<typename Spec::Format, kCount> batch;
        batch.load(payload, first);
        arrival = batch.wait(base, site, payload, first, turn.tag);
        if (arrival == Arrival::kHere) forward_packets(base, turn, pair, batch, first, shared);
    }
    if (!is_in_last_warp(block)) return arrival;
    const Arrival own = forward_head(params, turn, site, pair, routes, shared);
    return arrival == Arrival::kHere ? own : arrival;
}

/// Passes on what came along the rail. False: leave.
template <typename Shared>
DEEPCOMM_DEVICE bool forward_dispatch(const LowLatencyDispatchParams& params,
                                      const device::Block& block, const LowLatencyTurn& turn,
                                      Shared& shared) {
    const LowLatencyParams& base = params.base;
    block.sync();  // ORDER: the peers are found
    if (!forward_headers(params, block, turn, shared)) return false;
    int32_t most = 0;
    DEEPCOMM_NO_UNROLL
    for (int32_t i = 0; i < num_nodes(base) - 1; ++i) {
        const int32_t source = rail_rank(base, other_node(base, i));
        if (shared.peers.masked[source]) continue;
        most = shared.num_tokens[source] > most ? shared.num_tokens[source] : most;
    }
    RailWalk<Shared> walk = {base, shared, most, block.block_idx()};
    Pair pair{};
    DEEPCOMM_NO_UNROLL
    while (walk.advance(block, &pair)) {
        const Arrival arrival =
            forward_row(params, block, turn, pair, walk.routes_of(pair), shared);
        if (!block.sync_and(arrival != Arrival::kFailed)) return false;  // as one
        if (!base.mask_late || block.sync_and(arrival == Arrival::kHere)) continue;
        if (block.is_leader()) mask_late_peer<true>(base, turn, pair.source);
        walk.lost_source = pair.source;
    }
    return true;
}

}  // namespace deepcomm::kernels::low_latency
