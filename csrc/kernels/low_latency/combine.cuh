// SPDX-License-Identifier: Apache-2.0
// low_latency_combine: send phase, receive phase, or both in one launch. PROTOCOLS.md:
// low_latency_combine.
#pragma once

#include "kernels/low_latency/combine_receive.cuh"
#include "kernels/low_latency/combine_send.cuh"

namespace deepcomm::kernels {

template <int kHidden, int kPhases, int kThreads>
__global__ void __launch_bounds__(kThreads, kLowLatencyCombineBlocks)
    low_latency_combine(const __grid_constant__ LowLatencyCombineParams params) {
    using Shared = LowLatencyCombineShared<kHidden, kPhases, kThreads>;
    const device::Block block;
    auto& shared = device::shared_storage<Shared>();
    constexpr bool kSends = (kPhases & kSendPhase) != 0;
    constexpr bool kReceives = (kPhases & kReceivePhase) != 0;
    const layout::LowLatencyTurn turn =
        kSends ? low_latency::take_turn(params.base) : *params.base.turn;
    // All ranks know of a refused dispatch: none of its combines takes a turn.
    if (params.base.record[params.base.record_map.is_void]) return;
    if constexpr (kSends) {
        if (!low_latency::send_combine(params, block, turn, shared)) return;
    } else {
        low_latency::find_peers(params.base, block, &shared.peers);
    }
    if constexpr (kReceives) {
        low_latency::receive_combine<kPhases>(params, block, turn, shared);
    } else {
        low_latency::finish_send(params.base, block, turn);
    }
}

}  // namespace deepcomm::kernels
