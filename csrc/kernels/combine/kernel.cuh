// SPDX-License-Identifier: Apache-2.0
// combine: meets, which also frees the peers' combine regions, then pushes and reduces at the same
// time. PROTOCOLS.md: combine.
#pragma once

#include "kernels/combine/expert_sums.cuh"

namespace deepcomm::kernels {

/// The stages of this warp; those that push have some.
template <typename Spec>
DEEPCOMM_DEVICE typename Spec::Pipe pipe_of(const CombineBlock<Spec>& my) {
    const int32_t w = my.warp.warp_idx() % Spec::kPushWarps;
    return {my.smem.bank.bytes[w], my.smem.bank.full[w]};
}

/// By one thread: the rows that this rank pushes, all of them known beforehand.
template <typename Spec>
DEEPCOMM_DEVICE void count_pushed(const CombineBlock<Spec>& my) {
    uint64_t num_rows = 0;
    for (int32_t block = 0; block < Spec::kRowOrigins * Spec::kNumRanks; ++block) {
        const bool is_own = block % Spec::kNumRanks == my.rank();
        if (!is_own) num_rows += static_cast<uint64_t>(my.num_rows_of(block));
    }
    device::red_add_relaxed_gpu(&my.params.meet.counters->bytes_node, num_rows * Spec::kRowBytes);
}

template <typename Spec>
DEEPCOMM_DEVICE bool meet_for_combine(const CombineBlock<Spec>& my) {
    constexpr int32_t kNumWords = Spec::kWords.num_words();
    for (int32_t i = my.block.thread_idx(); i < kNumWords; i += my.block.size()) {
        my.smem.tables.plan[i] = my.params.table.plan[i];
    }
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

template <int32_t kNumRanks, int32_t kHidden, bool kByExpert, int32_t kOrigins>
__global__ void __launch_bounds__(CombineSpec<kNumRanks, kHidden, kByExpert, kOrigins>::kWarps * 32,
                                  1) combine(const __grid_constant__ CombineParams params) {
    using Spec = CombineSpec<kNumRanks, kHidden, kByExpert, kOrigins>;
    auto* state = static_cast<device::EpochState*>(params.meet.epoch);
    if (Spec::kStage == kStageBetweenNodes &&
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
