// SPDX-License-Identifier: Apache-2.0
// A combine where a network carries the rails: what is one phase elsewhere is several launches here, and
// the network is at work between them. PROTOCOLS.md: low latency over carried rails.
#pragma once

#include "kernels/low_latency/combine_receive.cuh"

namespace deepcomm::kernels::low_latency {

/// Sends headers and the weights that are given at this source; takes no turn yet.
template <typename Shared>
DEEPCOMM_DEVICE void announce_combine(const LowLatencyCombineParams& params,
                                      const device::Block& block, Shared& shared) {
    const LowLatencyParams& base = params.base;
    EarlyTurn early(base, block);
    read_record(params, block, shared);
    early.load_credits(base);
    const bool has_peers =
        open_turn<true>(base, Operation::kLowLatencyCombine, block, early, &shared.peers);
    // ORDER: what the record says, and the credits before all that is announced, to all
    if (!block.sync_and(has_peers)) return;
    const LowLatencyTurn turn = shared.peers.turn;
    if (block.block_idx() == block.num_blocks() - 1) {
        send_combine_headers(base, block, turn, shared);
    }
    send_weights(params, block, turn, shared);
}

/// Whether this launch hears of a rank: with weights given at the sources of all, whose headers have come
/// with these; else of those of the node. What other nodes say is on its way.
DEEPCOMM_DEVICE bool hears_of(const LowLatencyCombineParams& params, int32_t rank) {
    return params.source_weights != nullptr ||
           rank / params.base.map.ranks_per_node == params.base.node_idx;
}

/// Sums for the rail's ranks of other nodes, unless somebody whom it hears of ends the operation: then
/// the summands do not come.
template <typename Shared>
DEEPCOMM_DEVICE void pass_on_sums(const LowLatencyCombineParams& params, const device::Block& block,
                                  const LowLatencyTurn& turn, Shared& shared) {
    const LowLatencyParams& base = params.base;
    block.sync();  // ORDER: the peers are found
    find_cut_sources(base, block, shared);
    const CombineHeaders headers(base, turn, 0);
    bool goes_on = true;
    DEEPCOMM_NO_UNROLL
    for (int32_t peer = block.thread_idx(); peer < base.map.num_ranks; peer += block.size()) {
        shared.refusals.kinds[peer] = layout::RefusalKind::kNone;
        if (!hears_of(params, peer)) continue;
        goes_on = receive_combine_header(base, headers, peer, {}, shared) && goes_on;
    }
    if (!block.sync_and(goes_on)) return;  // ORDER: the headers before the block acts on them
    if (find_culprit(base, shared.refusals) != layout::kNoPeer) return;
    forward_sums(params, block, turn, shared);
}

/// The turn of a combine whose dispatch was refused: all ranks know, and the hosts, who do not, have the
/// network carry the slot of it. As of any turn, the slot's last one has ended before.
template <int kPhases, typename Shared>
DEEPCOMM_DEVICE void skip_turn(const LowLatencyParams& params, const device::Block& block,
                               Shared& shared) {
    if constexpr ((kPhases & kSendPhase) != 0) {
        EarlyTurn early(params, block);
        early.load_credits(params);
        const bool has_peers =
            open_turn<true>(params, Operation::kLowLatencyCombine, block, early, &shared.peers);
        if (!block.sync_and(has_peers)) return;  // ORDER: whose turn it is, to the leader
        finish_send<kPhases>(params, block, shared.peers.turn);
    }
    if constexpr ((kPhases & kReceivePhase) != 0)
        finish_receive<kPhases>(params, block, *params.turn);
}

/// One launch of a combine; guess: as for send_combine.
template <int kPhases, typename Shared>
DEEPCOMM_DEVICE void combine_carried(const LowLatencyCombineParams& params,
                                     const device::Block& block, const Summed& guess,
                                     Shared& shared) {
    const LowLatencyParams& base = params.base;
    constexpr bool kComesFirst = (kPhases & (kAnnouncePhase | kSendPhase)) != 0;
    if (!kComesFirst && !may_receive(base, block)) return;
    if (is_void(base)) return skip_turn<kPhases>(base, block, shared);
    if constexpr ((kPhases & kAnnouncePhase) != 0) {
        announce_combine(params, block, shared);
    } else if constexpr ((kPhases & kSendPhase) != 0) {
        if (send_combine(params, block, guess, shared)) {
            finish_send<kPhases>(base, block, shared.peers.turn);
        }
    } else {
        const LowLatencyTurn turn = *base.turn;
        read_record(params, block, shared);
        find_peers<true>(base, block, turn, &shared.peers);
        if constexpr ((kPhases & kPassOnPhase) != 0) {
            pass_on_sums(params, block, turn, shared);
        } else {
            receive_combine<kPhases>(params, block, turn, shared);
        }
    }
}

}  // namespace deepcomm::kernels::low_latency
