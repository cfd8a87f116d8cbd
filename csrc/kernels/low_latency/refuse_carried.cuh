// SPDX-License-Identifier: Apache-2.0
// low_latency_refuse_carried: low_latency_refuse where a network carries the rails, which is at work
// between its launches. PROTOCOLS.md: low latency over carried rails.
#pragma once

#include "kernels/low_latency/refuse.cuh"

namespace deepcomm::kernels {

struct LowLatencyRefuseCarriedShared : LowLatencyRefuseShared<true> {};

namespace low_latency {

/// Takes the turn, and tells node and rail if they await anything.
template <typename Shared>
DEEPCOMM_DEVICE void tell_refusal(const LowLatencyRefuseParams& params, const device::Block& block,
                                  Operation operation, bool is_awaited, Shared& shared) {
    EarlyTurn early(params.base, block);
    early.load_credits(params.base);
    const bool has_peers = open_turn<true>(params.base, operation, block, early, &shared.peers);
    if (!block.sync_and(has_peers)) return;  // ORDER: the credits before the refusal
    if (is_awaited) store_refusal<true>(params, block, shared.peers.turn, shared.peers);
}

}  // namespace low_latency

extern "C" __global__ void __launch_bounds__(256, 1)
    low_latency_refuse_carried(const __grid_constant__ LowLatencyRefuseParams params) {
    using namespace low_latency;
    const LowLatencyParams& base = params.base;
    const device::Block block;
    auto& shared = device::shared_storage<LowLatencyRefuseCarriedShared>();
    const Operation operation =
        params.is_combine ? Operation::kLowLatencyCombine : Operation::kLowLatencyDispatch;
    // Nobody awaits anything of a combine of a dispatch that was refused itself; but it has its turn.
    const bool is_awaited = base.record == nullptr || !base.record[base.record_map.is_void];
    if (params.step == RefuseStep::kTell) {
        tell_refusal(params, block, operation, is_awaited, shared);
        return;
    }
    if (!may_receive(base, block)) return;
    const LowLatencyTurn turn = turn_of_launch(base);
    find_peers<true>(base, block, turn, &shared.peers);
    block.sync();  // ORDER: the peers are found; the turn is read by all before it is counted
    if (params.step == RefuseStep::kEnd) {
        finish_send<kBothPhases>(base, block, turn);
        finish_receive<kBothPhases>(base, block, turn);
    } else if (is_awaited) {
        pass_on_beside_refusal(base, block, {operation, turn, shared.refusals}, shared);
    }
}

}  // namespace deepcomm::kernels
