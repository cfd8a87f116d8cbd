// SPDX-License-Identifier: Apache-2.0
// low_latency_combine: send phase, receive phase, or both in one launch; over several nodes one of
// them, or a part of one. PROTOCOLS.md: low_latency_combine, low latency over nodes, over carried rails.
#pragma once

#include "kernels/low_latency/combine_carried.cuh"

namespace deepcomm::kernels {

template <int kHidden, int kPhases, int kThreads>
__global__ void __launch_bounds__(kThreads, kLowLatencyCombineBlocks)
    low_latency_combine(const __grid_constant__ LowLatencyCombineParams params) {
    using Shared = LowLatencyCombineShared<kHidden, kPhases, kThreads>;
    const device::Block block;
    // Of no memory, and so beside the kernel ahead.
    const auto guess = low_latency::guess_summed<typename Shared::Spec>(params.base, block);
    device::await_kernel_ahead();
    auto& shared = device::shared_storage<Shared>();
    if constexpr (Shared::kIsCarried)
        return low_latency::combine_carried<kPhases>(params, block, guess, shared);
    constexpr bool kSends = (kPhases & kSendPhase) != 0;
    constexpr bool kReceives = (kPhases & kReceivePhase) != 0;
    layout::LowLatencyTurn found;
    const layout::LowLatencyTurn& turn = kSends ? shared.peers.turn : found;
    if constexpr (kSends) {
        if (!low_latency::send_combine(params, block, guess, shared)) return;
        low_latency::finish_send<kPhases>(params.base, block, turn);
    } else {
        found = *params.base.turn;  // meanwhile, as loads take long
        if (!low_latency::may_receive(params.base, block)) return;
        if (low_latency::is_void(params.base)) return;
        low_latency::read_record(params, block, shared);
        low_latency::find_peers<Shared::kHasNodes>(params.base, block, turn, &shared.peers);
    }
    if constexpr (kReceives) {
        low_latency::receive_combine<kPhases>(params, block, turn, shared);
    }
}

}  // namespace deepcomm::kernels
