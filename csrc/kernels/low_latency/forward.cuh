// SPDX-License-Identifier: Apache-2.0
// Passing on, over several nodes, what all low-latency operations begin with: headers. A rank waits for
// those of its rail and stores them to its node, or tells the node that a rank of the rail is absent.
// PROTOCOLS.md: low latency over nodes.
#pragma once

#include "kernels/low_latency/peers.cuh"
#include "kernels/low_latency/refusal.cuh"

namespace deepcomm::kernels::low_latency {

/// The headers of an operation that come along the rail.
struct RailHeaders {
    Operation operation;
    LowLatencyTurn turn;
    Refusals& refusals;  ///< in shared memory; what the rail's sources say, once they are here

    DEEPCOMM_DEVICE device::WaitSite site(int32_t source) const {
        return {operation, device::Role::kForward, source, turn.slot};
    }

    /// Where what a source has for the local-th rank of this node lies: a combine, and a host that
    /// refuses, have the same for all of them.
    DEEPCOMM_DEVICE int64_t offset(const LowLatencyParams& params, int32_t source,
                                   int32_t local) const {
        const bool is_for_all = operation == Operation::kLowLatencyCombine ||
                                refusals.kinds[source] == layout::RefusalKind::kByHost;
        if (is_for_all || local == params.rail_idx) {
            return params.map.header_offset(turn.slot, source);
        }
        const int32_t node = source / params.map.ranks_per_node;
        return params.map.rail_header_offset(turn.slot, node, local);
    }

    /// How many packets it has.
    DEEPCOMM_DEVICE int32_t num_packets(const LowLatencyParams& params, int32_t source) const {
        const bool is_one = operation == Operation::kLowLatencyCombine &&
                            refusals.kinds[source] != layout::RefusalKind::kByHost;
        return is_one ? 1 : params.map.header_packets;
    }
};

/// Waits for the first packet of each source of the rail and calls take(source, packet). Where late ones
/// are masked, it waits for the ranks of this node at the same time, so that a rank is late once, and no
/// rank comes later than others to the next operation. All threads of the block know the outcome. False:
/// leave.
template <typename Take>
DEEPCOMM_DEVICE bool await_rail(const LowLatencyParams& params, const device::Block& block,
                                const RailHeaders& headers, Peers* peers, Take&& take) {
    const uint64_t start_ns = start_of_waits(params, block);
    bool goes_on = true;
    const int32_t num_rail = num_nodes(params) - 1;
    const int32_t num = num_rail + (params.mask_late ? params.map.ranks_per_node : 0);
    DEEPCOMM_NO_UNROLL
    for (int32_t i = block.thread_idx(); i < num; i += block.size()) {
        const bool is_rail = i < num_rail;
        const int32_t source =
            is_rail ? rail_rank(params, other_node(params, i)) : node_rank(params, i - num_rail);
        if (peers->masked[source]) continue;
        const device::WaitSite site = headers.site(source);
        const Vec128* address =
            packets_at(params.local, params.map.header_offset(headers.turn.slot, source));
        Vec128 packet{};
        const Arrival arrival = wait_packet(params, site, address, headers.turn.tag, &packet);
        add_wait(params, source, start_ns);
        bool is_here = arrival == Arrival::kHere;
        if (params.mask_late && !takes_part(params, headers.turn, source, is_here)) {
            peers->masked[source] = 1;
            mask_late_peer<true>(params, headers.turn, source);
            continue;
        }
        // Late here, but another block has seen it.
        if (!is_here && params.mask_late) {
            is_here = must_arrive(params, site, address, headers.turn.tag, &packet);
        }
        goes_on = goes_on && is_here;
        if (is_here && is_rail) {
            note_header(params, &headers.refusals, source, packet);
            take(source, packet);
        }
    }
    return block.sync_and(goes_on);  // ORDER: who takes part, and what they say, to all
}

/// Reads the headers of the rail's sources for all ranks of this node and calls take(rank of the
/// source's node with the destination's index, packet's index, packet). The blocks share the sources
/// whose headers they store to the ranks that these are for. False: leave.
template <typename Take>
DEEPCOMM_DEVICE bool pass_on_headers(const LowLatencyParams& params, const device::Block& block,
                                     const RailHeaders& headers, const Peers& peers, Take&& take) {
    const int32_t num_local = params.map.ranks_per_node;
    const int32_t most = num_local * params.map.header_packets;
    bool goes_on = true;
    DEEPCOMM_NO_UNROLL
    for (int32_t i = block.thread_idx(); i < (num_nodes(params) - 1) * most; i += block.size()) {
        const int32_t node_index = i / most, local = i % most / params.map.header_packets;
        const int32_t index = i % params.map.header_packets, dst = node_rank(params, local);
        const int32_t source = rail_rank(params, other_node(params, node_index));
        Vec128 packet = {
            {params.signature, refusal_flag(layout::RefusalKind::kAbsent), 0, headers.turn.tag}};
        if (index >= (peers.masked[source] ? 1 : headers.num_packets(params, source))) continue;
        if (!peers.masked[source]) {
            const int64_t offset = headers.offset(params, source, local);
            const Vec128* from = packets_at(params.local, offset) + index;
            goes_on = must_arrive(params, headers.site(source), from, headers.turn.tag, &packet) &&
                      goes_on;
            take(source - params.rail_idx + local, index, packet);
        }
        const bool is_mine = node_index % block.num_blocks() == block.block_idx();
        if (!goes_on || !is_mine || local == params.rail_idx || peers.masked[dst]) continue;
        const int64_t to = params.map.header_offset(headers.turn.slot, source);
        device::st_relaxed_sys(packets_at(peers.bases[dst], to) + index, packet);
    }
    return block.sync_and(goes_on);  // ORDER: what the headers say, to all
}

}  // namespace deepcomm::kernels::low_latency
