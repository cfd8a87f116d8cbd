// SPDX-License-Identifier: Apache-2.0
// The end of a dispatch: every block tells every rank that its rows are there; one block waits for
// all ranks and sees to the rows that hold no token. PROTOCOLS.md: dispatch_send.
#pragma once

#include "kernels/dispatch/send_shared.cuh"

namespace deepcomm::kernels {

/// All threads of the block have finished their stores.
template <typename Spec>
DEEPCOMM_DEVICE void signal_arrival(const SendBlock<Spec>& my) {
    const auto others = static_cast<uint32_t>(my.block.num_blocks() - 1);
    const uint32_t share = my.block.block_idx() == 0 ? layout::kArrivals - others : 1;
    for (int32_t dst = my.block.thread_idx(); dst < Spec::kNumRanks; dst += my.block.size()) {
        unsigned char* to = my.params.meet.comm.bases[dst];
        auto* word =
            reinterpret_cast<uint32_t*>(to + my.params.meet.layout.arrived_from(my.rank()));
        device::red_add_release_sys(word, share);  // ORDER: pairs with the wait below
    }
}

/// How much longer a rank waits for itself: whoever of it waits for others runs out first, and knows more.
constexpr uint64_t kOwnPatience = 2;

/// By one block.
template <typename Spec>
DEEPCOMM_DEVICE bool await_arrivals(const SendBlock<Spec>& my) {
    const CommParams& comm = my.params.meet.comm;
    bool is_complete = true;
    for (int32_t src = my.block.thread_idx(); src < Spec::kNumRanks; src += my.block.size()) {
        const device::WaitSite site = {device::Operation::kDispatch, device::Role::kReceive, src};
        const auto* word = reinterpret_cast<const uint32_t*>(
            comm.bases[my.rank()] + my.params.meet.layout.arrived_from(src));
        device::WaitContext context = wait_context(comm);
        if (src == my.rank()) context.timeout_ns *= kOwnPatience;
        // ORDER: pairs with the additions of all blocks of src; the kernel's end passes it on
        is_complete =
            device::wait_reached_acquire_sys(context, site, word, my.round * layout::kArrivals) &&
            is_complete;
    }
    return my.block.sync_and(is_complete);  // ORDER: all acquires before the block goes on
}

}  // namespace deepcomm::kernels
