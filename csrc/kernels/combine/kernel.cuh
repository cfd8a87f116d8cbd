// SPDX-License-Identifier: Apache-2.0
// combine: meets, which also frees the peers' combine regions, then pushes and reduces at the same
// time. PROTOCOLS.md: combine.
#pragma once

#include "kernels/combine/push.cuh"
#include "kernels/combine/reduce.cuh"

namespace deepcomm::kernels {

/// TOKEN rows go through the warp's stages.
template <typename Spec>
struct PushRole {
    static DEEPCOMM_DEVICE void prepare(const CombineBlock<Spec>& my) {
        if (my.warp.warp_idx() < Spec::kPushWarps && my.warp.is_leader()) pipe(my).init();
    }
    static DEEPCOMM_DEVICE typename Spec::Pipe pipe(const CombineBlock<Spec>& my) {
        const int32_t w = my.warp.warp_idx();
        return {my.smem.bank.bytes[w], my.smem.bank.full[w]};
    }
    static DEEPCOMM_DEVICE bool run(const CombineBlock<Spec>& my) {
        typename Spec::Pipe stages = pipe(my);
        return push_rows(my, stages);
    }
};

/// Sums by experts go from registers to the peer.
template <int32_t kNumRanks, int32_t kHidden>
struct PushRole<CombineSpec<kNumRanks, kHidden, true>> {
    using Block = CombineBlock<CombineSpec<kNumRanks, kHidden, true>>;

    static DEEPCOMM_DEVICE void prepare(const Block& /*my*/) {}
    static DEEPCOMM_DEVICE bool run(const Block& my) {
        push_sums(my);
        return true;
    }
};

/// By one thread: the rows that this rank pushes, all of them known beforehand.
template <typename Spec>
DEEPCOMM_DEVICE void count_pushed(const CombineBlock<Spec>& my) {
    uint64_t num_rows = 0;
    for (int32_t peer = 0; peer < Spec::kNumRanks; ++peer) {
        if (peer != my.rank()) num_rows += static_cast<uint64_t>(my.num_rows_of(peer));
    }
    device::red_add_relaxed_gpu(&my.params.meet.counters->bytes_node, num_rows * Spec::kRowBytes);
}

template <typename Spec>
DEEPCOMM_DEVICE bool meet_for_combine(const CombineBlock<Spec>& my) {
    const layout::PlanLayout words = my.words();
    for (int32_t i = my.block.thread_idx(); i < words.num_words(); i += my.block.size()) {
        my.smem.tables.plan[i] = my.params.table.plan[i];
    }
    PushRole<Spec>::prepare(my);
    if (my.block.block_idx() == 0) publish_header(my.params.meet, my.block, my.epoch, 0);
    return await_headers(my.params.meet, my.block, device::Operation::kCombine, my.epoch,
                         &my.smem.tables.meet);
}

template <int32_t kNumRanks, int32_t kHidden, bool kByExpert>
__global__ void __launch_bounds__(CombineSpec<kNumRanks, kHidden, kByExpert>::kWarps * 32, 1)
    combine(const __grid_constant__ CombineParams params) {
    using Spec = CombineSpec<kNumRanks, kHidden, kByExpert>;
    auto* state = static_cast<device::EpochState*>(params.meet.epoch);
    const CombineBlock<Spec> my = {
        params,
        device::shared_storage<CombineShared<kNumRanks, kHidden, kByExpert>>(),
        {},
        {},
        device::current_epoch(state)};
    if (!meet_for_combine(my)) return;
    bool is_complete = true;
    if (my.smem.tables.meet.status == MeetStatus::kGood) {
        if (my.block.block_idx() == 0 && my.block.is_leader()) count_pushed(my);
        is_complete =
            my.warp.warp_idx() < Spec::kPushWarps ? PushRole<Spec>::run(my) : reduce_tokens(my);
    } else if (my.block.block_idx() == 0 && my.block.is_leader()) {
        report_trouble(params.meet, my.smem.tables.meet);
    }
    if (!my.block.sync_and(is_complete)) return;  // ORDER: every thread has read the epoch
    if (my.block.is_leader()) device::finish_epoch(state, my.block.num_blocks());
}

}  // namespace deepcomm::kernels
