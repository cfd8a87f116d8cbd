// SPDX-License-Identifier: Apache-2.0
// Role, over several nodes, in the receive phase: a block sums what the ranks of this node have for a
// part of a token of another node and of this rank's rail, rounds once and stores packets to the token's
// rank. And the terms that arrive there. PROTOCOLS.md: low latency over nodes.
#pragma once

#include "kernels/low_latency/combine_send.cuh"
#include "kernels/low_latency/combine_terms.cuh"

namespace deepcomm::kernels::low_latency {

/// The terms of what this rank sums for the rail's rank of another node: by local rank of this one.
struct RelayTerms {
    static constexpr device::Role kRole = device::Role::kReduce;

    int32_t node;  ///< of the token

    DEEPCOMM_DEVICE int32_t num(const LowLatencyParams& params) const {
        return params.map.ranks_per_node;
    }
    DEEPCOMM_DEVICE int32_t rank_of(const LowLatencyParams& params, int32_t term) const {
        return node_rank(params, term);
    }
    DEEPCOMM_DEVICE int64_t offset(const LowLatencyParams& params, const LowLatencyTurn& turn,
                                   int32_t term, int32_t token) const {
        if (term == params.rail_idx) return params.map.rail_row_offset(turn.slot, node, token);
        const int32_t rank = node * params.map.ranks_per_node + term;
        return params.map.row_offset(turn.slot, rank, token);
    }
    DEEPCOMM_DEVICE const uint32_t* find_kept(const LowLatencyParams&, int32_t) const {
        return nullptr;
    }
    template <typename Sum>
    DEEPCOMM_DEVICE void come_to(const LowLatencyParams&, int32_t, Sum*) {}
};

/// The terms of a token at home: the ranks of this node, whose sum is not rounded, then those of the
/// rail, one a node. The sum of this node is set aside until its turn comes among the nodes.
struct NodeTerms {
    static constexpr device::Role kRole = device::Role::kReceive;
    enum Stage : int32_t { kInside, kBefore, kBehind };

    float* parked;  ///< in shared memory, a stride of threads apart
    Stage stage;

    DEEPCOMM_DEVICE int32_t of(const LowLatencyParams& params, int32_t rank) const {
        const Divisor num_local = params.map.ranks_per_node;
        if (rank < 0) return -1;
        const int32_t node = rank / num_local;
        if (node == params.node_idx) return rank % num_local;
        return num_local + node - (node > params.node_idx ? 1 : 0);
    }
    DEEPCOMM_DEVICE int32_t num(const LowLatencyParams& params) const {
        return params.map.ranks_per_node + num_nodes(params) - 1;
    }
    DEEPCOMM_DEVICE int32_t rank_of(const LowLatencyParams& params, int32_t term) const {
        const int32_t node = term - params.map.ranks_per_node;
        if (node < 0) return node_rank(params, term);
        return rail_rank(params, node + (node >= params.node_idx ? 1 : 0));
    }
    DEEPCOMM_DEVICE int64_t offset(const LowLatencyParams& params, const LowLatencyTurn& turn,
                                   int32_t term, int32_t token) const {
        return params.map.row_offset(turn.slot, rank_of(params, term), token);
    }

    DEEPCOMM_DEVICE const uint32_t* find_kept(const LowLatencyParams&, int32_t) const {
        return nullptr;
    }

    template <typename Sum>
    DEEPCOMM_DEVICE void come_to(const LowLatencyParams& params, int32_t term, Sum* sum) {
        const int32_t num_before = term - params.map.ranks_per_node;
        if (stage == kInside && num_before >= 0) {
            park(*sum);
            sum->clear();
            stage = kBefore;
        }
        if (stage == kBefore && num_before >= params.node_idx) {
            add_parked(sum);
            stage = kBehind;
        }
        if (term == num(params)) stage = kInside;
    }

    template <typename Sum>
    DEEPCOMM_DEVICE void park(const Sum& sum) {
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < Sum::kCount; ++i) {
            DEEPCOMM_UNROLL
            for (int32_t part = 0; part < Sum::kWords; ++part) {
                float* at = place<Sum>(i, part);
                at[0] = sum.low[i][part];
                at[Sum::kNumThreads] = sum.high[i][part];
            }
        }
    }

    template <typename Sum>
    DEEPCOMM_DEVICE void add_parked(Sum* sum) {
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < Sum::kCount; ++i) {
            DEEPCOMM_UNROLL
            for (int32_t part = 0; part < Sum::kWords; ++part) {
                const float* at = place<Sum>(i, part);
                sum->low[i][part] = device::fadd_rn(sum->low[i][part], at[0]);
                sum->high[i][part] = device::fadd_rn(sum->high[i][part], at[Sum::kNumThreads]);
            }
        }
    }

    template <typename Sum>
    DEEPCOMM_DEVICE float* place(int32_t i, int32_t part) const {
        const device::Block block;
        return parked + (i * Sum::kWords + part) * 2 * Sum::kNumThreads + block.thread_idx();
    }
};

template <typename Shared, bool kHasNodes>
struct TermsAtHome {
    using Type = RankTerms<Shared::kKeepsSum>;
};

template <typename Shared>
struct TermsAtHome<Shared, true> {
    using Type = NodeTerms;
};

template <typename Shared>
using AwaitedToken =
    Awaited<typename Shared::Spec, typename TermsAtHome<Shared, Shared::kHasNodes>::Type>;

/// Stores a thread's packets of a sum, rounded: first, first + threads, ...
template <typename Spec>
DEEPCOMM_DEVICE void store_sum(const TokenSum<Spec>& sum, Vec128* packets, int32_t first,
                               uint32_t tag) {
    using Sum = TokenSum<Spec>;
    DEEPCOMM_UNROLL
    for (int32_t i = 0; i < Sum::kCount; ++i) {
        const int32_t index = first + i * Spec::kNumThreads;
        if (index >= Spec::kPartPackets) continue;
        Vec128 packet = {{0, 0, 0, tag}};
        DEEPCOMM_UNROLL
        for (int32_t part = 0; part < Sum::kWords; ++part) {
            packet.words[part] = device::bf16x2_from_floats(sum.low[i][part], sum.high[i][part]);
        }
        device::st_relaxed_sys(packets + index, packet);
    }
}

/// The first warp: brings the values of a token's columns back from the ranks of this node.
template <typename Awaited>
DEEPCOMM_DEVICE Arrival forward_carried(const LowLatencyParams& params, const device::Warp& warp,
                                        const LowLatencyTurn& turn, const Awaited& awaited,
                                        Vec128* head) {
    constexpr auto kWords = static_cast<int32_t>(layout::kPacketWords);
    const int32_t k = warp.thread_idx();
    float value;
    const Arrival arrival = wait_carried(params, warp, turn, awaited, &value);
    Vec128 packet = {{0, 0, 0, turn.tag}};
    DEEPCOMM_UNROLL
    for (int32_t part = 0; part < kWords; ++part) {
        const int32_t column = k * kWords + part;  // lanes behind the last packet have none
        const float carried = device::warp_shuffle(value, column % device::kWarpSize);
        packet.words[part] = column < params.num_topk ? device::float_bits(carried) : 0;
    }
    if (arrival != Arrival::kFailed && k * kWords < params.num_topk) {
        device::st_relaxed_sys(head + k, packet);
    }
    return arrival;
}

/// One part of a token of another node. False: leave.
template <typename Spec>
DEEPCOMM_DEVICE bool forward_sum(const LowLatencyCombineParams& params, const device::Block& block,
                                 const LowLatencyTurn& turn, Awaited<Spec, RelayTerms>& awaited,
                                 Vec128* head) {
    using Sum = TokenSum<Spec>;
    const LowLatencyParams& base = params.base;
    const device::Warp warp;
    Arrival arrival = Arrival::kHere;
    if (awaited.at.part == 0 && params.out_topk_weights != nullptr && warp.warp_idx() == 0) {
        arrival = forward_carried(base, warp, turn, awaited, head);
    }
    Vec128* packets = payload_of(base, head) + awaited.at.part * Spec::kPartPackets;
    DEEPCOMM_NO_UNROLL
    for (int32_t i = 0; i < Sum::kAll; i += Sum::kCount) {
        const int32_t first = block.thread_idx() + i * Spec::kNumThreads;
        Sum sum;
        awaited.load(base, turn, first);
        const Arrival all = sum_terms(base, turn, awaited, first, &sum);
        arrival = arrival == Arrival::kFailed ? arrival : all;
        if (!block.sync_and(arrival != Arrival::kFailed)) return false;  // as one
        store_sum(sum, packets, first, turn.tag);
    }
    return true;
}

/// Sums for the rail's ranks of other nodes. False: leave.
template <typename Shared>
DEEPCOMM_DEVICE bool forward_sums(const LowLatencyCombineParams& params, const device::Block& block,
                                  const LowLatencyTurn& turn, Shared& shared) {
    using Spec = typename Shared::Spec;
    const LowLatencyParams& base = params.base;
    const int32_t k = device::Warp{}.thread_idx();
    const int32_t num_parts = base.map.max_tokens * Spec::kNumParts;  // of a node
    Awaited<Spec, RelayTerms> awaited{};
    DEEPCOMM_NO_UNROLL
    for (int32_t i = block.block_idx(); i < num_parts * (num_nodes(base) - 1);
         i += block.num_blocks()) {
        const int32_t node = other_node(base, i / num_parts), source = rail_rank(base, node);
        awaited.come_to(i % num_parts);
        const int32_t token = awaited.at.token;
        if (token >= shared.num_tokens[source] || cut_sources(shared)[source]) continue;
        const int32_t local = k < base.num_topk ? routes_of(base, source, token)[k] : -1;
        const bool is_here = local >= 0 && !shared.peers.masked[node_rank(base, local)];
        if (device::warp_ballot(is_here) == 0) continue;
        awaited.terms.node = node;
        awaited.mine = is_here ? local : -1;
        const int64_t offset = base.map.row_offset(turn.slot, base.comm.rank, token);
        Vec128* head = packets_at(shared.peers.bases[source], offset);
        if (!forward_sum(params, block, turn, awaited, head)) return false;
    }
    return true;
}

/// What a receive phase over several nodes begins with. False: leave.
template <typename Shared>
DEEPCOMM_DEVICE bool open_nodes(const LowLatencyCombineParams& params, const device::Block& block,
                                const LowLatencyTurn& turn, Shared& shared) {
    find_cut_sources(params.base, block, shared);
    if (params.source_weights != nullptr) return true;  // the send phase has passed them on
    return forward_combine_headers(params.base, block, turn, shared);
}

}  // namespace deepcomm::kernels::low_latency
