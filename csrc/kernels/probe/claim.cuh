// SPDX-License-Identifier: Apache-2.0
// Store buffering: each of two ranks raises its own claim and then looks at the other's. Only
// fence.sc between the two makes sure that not both miss the other. PROTOCOLS.md: probe_claim.
#pragma once

#include "kernels/probe/common.cuh"

namespace deepcomm::kernels {

extern "C" __global__ void __launch_bounds__(256)
    probe_claim(const __grid_constant__ ClaimParams params) {
    const device::Block block;
    const int32_t stride = block.size() * block.num_blocks();
    const int32_t first = block.block_idx() * block.size() + block.thread_idx();
    for (int32_t round = first; round < params.probe.num_rounds; round += stride) {
        device::st_relaxed_sys(&params.my_claims[round], 1u);
        device::fence_sc_sys();  // ORDER: the claim before the look; pairs with the peer's
        const uint32_t peer_claim = device::ld_relaxed_sys(&params.peer_claims[round]);
        if (peer_claim == 0) params.owners[round] = static_cast<uint32_t>(params.probe.rank) + 1;
    }
}

}  // namespace deepcomm::kernels
