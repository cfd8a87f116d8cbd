// SPDX-License-Identifier: Apache-2.0
// With several nodes: who sends tokens on inside a node tells their ranks, over the rail, whether
// some of them were lost there. Each word carries its epoch. PROTOCOLS.md: nodes.
#pragma once

#include "kernels/dispatch/send_shared.cuh"

namespace deepcomm::kernels {

/// By one block, when dispatch_count of this rank has ended.
template <typename Spec>
DEEPCOMM_DEVICE void tell_of_lost(const SendBlock<Spec>& my) {
    const RailSide& rail = my.params.rail;
    if (rail.lost == nullptr) return;
    for (int32_t dst = my.block.thread_idx(); dst < rail.comm.num_ranks; dst += my.block.size()) {
        auto* word = reinterpret_cast<uint64_t*>(rail.comm.bases[dst] +
                                                 rail.layout.lost_at(my.epoch, rail.comm.rank));
        device::st_relaxed_sys(word, static_cast<uint64_t>(my.epoch) << 32 | rail.lost[dst]);
    }
}

/// By the same block, later.
template <typename Spec>
DEEPCOMM_DEVICE bool hear_of_lost(const SendBlock<Spec>& my) {
    const RailSide& rail = my.params.rail;
    if (rail.lost == nullptr) return true;
    bool is_complete = true;
    for (int32_t src = my.block.thread_idx(); src < rail.comm.num_ranks; src += my.block.size()) {
        const device::WaitSite site = {device::Operation::kDispatch, device::Role::kCount, src};
        const auto* word = reinterpret_cast<const uint64_t*>(rail.comm.bases[rail.comm.rank] +
                                                             rail.layout.lost_at(my.epoch, src));
        uint64_t value = 0;
        is_complete = await_tagged(wait_context(rail.comm), site, word, my.epoch, &value,
                                   [](const uint64_t* at) { return device::ld_relaxed_sys(at); }) &&
                      is_complete;
        if ((value & 1) != 0) device::atom_or_relaxed_gpu(rail.overflow, 1u);
    }
    return my.block.sync_and(is_complete);  // ORDER: all words before the block goes on
}

}  // namespace deepcomm::kernels
