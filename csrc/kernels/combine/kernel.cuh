// SPDX-License-Identifier: Apache-2.0
// combine: meets, which also frees the peers' combine regions, then pushes and reduces at the same
// time. Inside a node its sums go on to the ranks of the rail. PROTOCOLS.md: combine, nodes.
#pragma once

#include "kernels/combine/expert_sums.cuh"

namespace deepcomm::kernels {

/// The stages of this warp; those that push have some.
template <typename Spec>
DEEPCOMM_DEVICE typename Spec::Pipe pipe_of(const CombineBlock<Spec>& my) {
    const int32_t w = my.warp.warp_idx() % Spec::kPushWarps;
    return {my.smem.bank.bytes[w], my.smem.bank.full[w]};
}

DEEPCOMM_DEVICE void count_rows(Counters* counters, int64_t num_rows, int32_t row_bytes) {
    device::red_add_relaxed_gpu(&counters->bytes_node, static_cast<uint64_t>(num_rows * row_bytes));
}

/// By one thread: the rows that this rank writes to others, all of them known beforehand.
template <typename Spec>
DEEPCOMM_DEVICE void count_pushed(const CombineBlock<Spec>& my) {
    int64_t num_rows = 0;
    for (int32_t block = 0; block < Spec::kRowOrigins * Spec::kNumRanks; ++block) {
        const bool is_own = block % Spec::kNumRanks == my.rank();
        if (!is_own) num_rows += my.num_rows_of(block);
    }
    count_rows(my.params.meet.counters, num_rows, Spec::kRowBytes);
    if constexpr (Spec::kStage == kStageInNode) {
        const int32_t own = my.own_origin();
        const int32_t num_own = my.tokens_from(own + 1) - my.tokens_from(own);
        count_rows(my.params.rail.counters, my.num_tokens() - num_own, Spec::kRowBytes);
    }
}

template <typename Spec>
DEEPCOMM_DEVICE bool meet_for_combine(const CombineBlock<Spec>& my) {
    load_plan(my);
    if (my.warp.warp_idx() < Spec::kPushWarps && my.warp.is_leader()) pipe_of(my).init();
    if (my.block.block_idx() == 0) {
        const uint32_t refusal = refusal_of_plan(my.params.table.plan, Spec::kWords);
        publish_header(my.params.meet, my.block, my.epoch, {refusal, my.params.num_tokens});
    }
    return await_headers(my.params.meet, my.block, device::Operation::kCombine, my.epoch,
                         &my.smem.tables.meet);
}

/// What this warp does once the ranks have met.
template <typename Spec>
DEEPCOMM_DEVICE bool push_and_reduce(const CombineBlock<Spec>& my) {
    typename Spec::Pipe pipe = pipe_of(my);
    if constexpr (Spec::kByExpert) {
        return sum_by_experts(my, pipe);
    } else {
        bool is_complete = true;
        if (my.is_pusher()) is_complete = push_rows(my, pipe);
        if (!my.are_roles_apart()) {
            if (my.is_pusher()) return is_complete;
        } else if (my.pushes()) {
            is_complete =
                my.block.sync_and(is_complete);  // no warp reduces while others still push
        }
        return is_complete && reduce_tokens(my);
    }
}

/// Ends the operation for this block; the last one lets later stages begin.
template <typename Spec>
DEEPCOMM_DEVICE void finish(const CombineBlock<Spec>& my) {
    const MeetParams& meet = my.params.meet;
    if (my.block.block_idx() == 0) {
        record_verdict(meet, my.smem.tables.meet, my.epoch);
        report_trouble(meet);
    }
    auto* state = static_cast<device::EpochState*>(meet.epoch);
    if (!device::finish_epoch(state, my.block.num_blocks())) return;
    end_work(meet.taken);
    end_stage(meet, my.epoch);
}

template <int32_t kNumRanks, int32_t kHidden, bool kByExpert, int32_t kNumOrigins>
__global__ void __launch_bounds__(CombineSpec<kNumRanks, kHidden, kByExpert, kNumOrigins>::kWarps *
                                      32,
                                  1) combine(const __grid_constant__ CombineParams params) {
    using Spec = CombineSpec<kNumRanks, kHidden, kByExpert, kNumOrigins>;
    auto* state = static_cast<device::EpochState*>(params.meet.epoch);
    if (Spec::kStage == kStageInNode &&
        !may_begin(params.meet, {}, device::Operation::kCombine, device::current_epoch(state))) {
        return;
    }
    const CombineBlock<Spec> my = {params,
                                   device::shared_storage<typename CombineBlock<Spec>::Shared>(),
                                   {},
                                   {},
                                   device::current_epoch(state)};
    if (!meet_for_combine(my)) return;
    bool is_complete = true;
    if (my.smem.tables.meet.status == MeetStatus::kGood) {
        if (my.block.block_idx() == 0 && my.block.is_leader()) count_pushed(my);
        is_complete = push_and_reduce(my);
    }
    if (!my.block.sync_and(is_complete)) return;  // ORDER: all work is taken, the epoch read
    if (my.block.is_leader()) finish(my);
}

}  // namespace deepcomm::kernels
