// SPDX-License-Identifier: Apache-2.0
// A combine of several nodes, on its rail. combine_open: the ranks of the rail meet, which frees their
// combine regions; then `combine` inside each node writes its sums there. combine_nodes: adds them up.
// PROTOCOLS.md: nodes.
#pragma once

#include "kernels/combine/reduce.cuh"

namespace deepcomm::kernels {

constexpr int32_t kOpenThreads = 128;

template <int32_t kNumRanks>
using CombineOpenShared = MeetTable<kNumRanks>;

/// One block. Counts the operation on the rail, whatever it comes to.
template <int32_t kNumRanks>
__global__ void __launch_bounds__(kOpenThreads, 1)
    combine_open(const __grid_constant__ CombineOpenParams params) {
    const MeetParams& meet = params.meet;
    const device::Block block;
    auto& table = device::shared_storage<CombineOpenShared<kNumRanks>>();
    auto* state = static_cast<device::EpochState*>(meet.epoch);
    const uint32_t epoch = device::current_epoch(state);
    if (block.is_leader()) meet.verdict->met_epoch = kNotMet;  // until this kernel has ended well
    // What one stage of the dispatch did not make is refused here: the whole rail must know.
    const bool is_made = *params.rail_made != 0 && *params.node_made != 0;
    publish_header(meet, block, epoch, {is_made ? 0 : kUnmadeHandle, params.num_tokens});
    if (!await_headers(meet, block, device::Operation::kCombine, epoch, &table)) return;
    if (!block.is_leader()) return;
    device::st_relaxed_gpu(meet.taken + kQueueBetweenNodes, 0);
    record_verdict(meet, table, epoch);
    device::finish_epoch(state, block.num_blocks());
    end_stage(meet, epoch);
}

template <int32_t kNumRanks, int32_t kHidden>
using CombineNodesShared = CombineShared<kNumRanks, kHidden, false, 0>;

/// Meets nobody, and ends nothing: what is called off or has failed, each rank's node knows.
template <int32_t kNumRanks, int32_t kHidden>
__global__ void __launch_bounds__(CombineSpec<kNumRanks, kHidden, false, 0>::kWarps * 32, 1)
    combine_nodes(const __grid_constant__ CombineParams params) {
    using Spec = CombineSpec<kNumRanks, kHidden, false, 0>;
    const MeetParams& meet = params.meet;
    // The operation that combine_open has counted; one that has failed there leaves an older one.
    const uint32_t epoch = static_cast<const device::EpochState*>(meet.epoch)->epoch;
    const CombineBlock<Spec> my = {
        params, device::shared_storage<CombineNodesShared<kNumRanks, kHidden>>(), {}, {}, epoch};
    if (meet.verdict->met_epoch != epoch) return;
    if (!may_begin(meet, my.block, device::Operation::kCombine, epoch)) return;
    if (was_called_off(meet)) return;
    load_plan(my);
    my.block.sync();  // ORDER: the plan before its readers
    (void)reduce_tokens(my);
}

}  // namespace deepcomm::kernels
