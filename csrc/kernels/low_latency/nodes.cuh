// SPDX-License-Identifier: Apache-2.0
// The ways between ranks of several nodes: a rank stores to the ranks of its node and to those of its
// rail, and these pass on. On one node every way is direct, and all of this falls away. PROTOCOLS.md:
// low latency over nodes.
#pragma once

#include "kernels/low_latency/packets.cuh"

namespace deepcomm::kernels::low_latency {

DEEPCOMM_DEVICE int32_t num_nodes(const LowLatencyParams& params) {
    return params.map.num_ranks / params.map.ranks_per_node;
}

/// Whether the block may begin a receive phase: a send phase that has failed has not said whose turn it
/// is.
DEEPCOMM_DEVICE bool may_receive(const LowLatencyParams& params, const device::Block& block) {
    return block.sync_and(device::ld_relaxed_gpu(params.comm.failed) == 0);  // as one
}

/// The rank of this rank's rail in a node.
DEEPCOMM_DEVICE int32_t rail_rank(const LowLatencyParams& params, int32_t node) {
    return node * params.map.ranks_per_node + params.rail_idx;
}

/// The local-th rank of this node.
DEEPCOMM_DEVICE int32_t node_rank(const LowLatencyParams& params, int32_t local) {
    return params.node_idx * params.map.ranks_per_node + local;
}

/// The other nodes in turn, the one after this first: index from 0 to num_nodes - 2.
DEEPCOMM_DEVICE int32_t other_node(const LowLatencyParams& params, int32_t index) {
    return (params.node_idx + 1 + index) % num_nodes(params);
}

/// The rank to store to what is meant for dst.
template <bool kHasNodes>
DEEPCOMM_DEVICE int32_t next_rank_to(const LowLatencyParams& params, int32_t dst) {
    if (!kHasNodes) return dst;
    const int32_t node = dst / params.map.ranks_per_node;
    return node == params.node_idx ? dst : rail_rank(params, node);
}

/// The rank that stores here what comes from a source.
template <bool kHasNodes>
DEEPCOMM_DEVICE int32_t last_rank_from(const LowLatencyParams& params, int32_t source) {
    if (!kHasNodes) return source;
    const int32_t local = source % params.map.ranks_per_node;
    return local == params.rail_idx ? source : node_rank(params, local);
}

/// Whether nothing goes to dst because a rank on the way is masked.
template <bool kHasNodes>
DEEPCOMM_DEVICE bool is_cut_to(const LowLatencyParams& params, const Peers& peers, int32_t dst) {
    if (peers.masked[dst]) return true;
    return kHasNodes && peers.masked[next_rank_to<kHasNodes>(params, dst)];
}

/// Marks the sources of which nothing comes because a rank on the way is masked. Writes none of what
/// it reads: sources of other nodes and rails, and ranks of this node.
DEEPCOMM_DEVICE void mask_cut_sources(const LowLatencyParams& params, const device::Block& block,
                                      Peers* peers) {
    for (int32_t source = block.thread_idx(); source < params.map.num_ranks;
         source += block.size()) {
        const int32_t last = last_rank_from<true>(params, source);
        if (last != source && peers->masked[last]) peers->masked[source] = 1;
    }
}

}  // namespace deepcomm::kernels::low_latency
