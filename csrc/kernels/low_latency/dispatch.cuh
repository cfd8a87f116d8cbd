// SPDX-License-Identifier: Apache-2.0
// low_latency_dispatch: send phase, receive phase, or both in one launch; over several nodes one of
// them. PROTOCOLS.md: low_latency_dispatch, low latency over nodes.
#pragma once

#include "kernels/low_latency/dispatch_forward.cuh"
#include "kernels/low_latency/dispatch_send.cuh"

namespace deepcomm::kernels {

template <int kHidden, int kRows, int kPhases, int kThreads>
__global__ void __launch_bounds__(kThreads, low_latency_dispatch_blocks(kRows, kPhases))
    low_latency_dispatch(const __grid_constant__ LowLatencyDispatchParams params) {
    using Shared = LowLatencyDispatchShared<kHidden, kRows, kPhases, kThreads>;
    device::await_kernel_ahead();
    const device::Block block;
    auto& shared = device::shared_storage<Shared>();
    constexpr bool kSends = (kPhases & kSendPhase) != 0;
    constexpr bool kReceives = (kPhases & kReceivePhase) != 0;
    layout::LowLatencyTurn found;
    const layout::LowLatencyTurn& turn = kSends ? shared.peers.turn : found;
    if constexpr (kSends) {
        if (!low_latency::send_dispatch(params, block, shared)) return;
        low_latency::finish_send<kPhases>(params.base, block, turn);
    } else {
        found = *params.base.turn;  // meanwhile, as loads take long
        if (!low_latency::may_receive(params.base, block)) return;
        low_latency::find_peers<Shared::kHasNodes>(params.base, block, turn, &shared.peers);
    }
    if constexpr (kReceives && Shared::kHasNodes) {
        if (!low_latency::forward_dispatch(params, block, turn, shared)) return;
    }
    if constexpr (kReceives) {
        low_latency::receive_dispatch<kPhases>(params, block, turn, shared);
    }
}

}  // namespace deepcomm::kernels
