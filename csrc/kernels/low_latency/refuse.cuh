// SPDX-License-Identifier: Apache-2.0
// low_latency_refuse: takes the turn of an operation that this rank's host has found to be wrong.
// Every peer learns why; what they send is dropped. PROTOCOLS.md: low_latency_refuse.
#pragma once

#include "kernels/low_latency/forward.cuh"

namespace deepcomm::kernels {

template <bool kHasNodes>
struct LowLatencyRefuseShared {
    low_latency::Peers peers;
};

template <>
struct LowLatencyRefuseShared<true> {
    low_latency::Peers peers;
    low_latency::Refusals refusals;  ///< of the rail's ranks
};

namespace low_latency {

/// Packet of the header of a refusal: the first says so, the others bring the text.
DEEPCOMM_DEVICE Vec128 refusal_packet(const LowLatencyRefuseParams& params, int32_t packet,
                                      uint32_t tag) {
    if (packet == 0) {
        return {{params.base.signature, refusal_flag(layout::RefusalKind::kByHost), 0, tag}};
    }
    const auto first = (packet - 1) * static_cast<int32_t>(layout::kPacketWords);
    if (first >= layout::kMessageWords) return {{0, 0, 0, tag}};
    return {{params.message[first], params.message[first + 1], params.message[first + 2], tag}};
}

/// Stores it to all peers, or over several nodes to those of this node and rail.
template <bool kHasNodes>
DEEPCOMM_DEVICE void store_refusal(const LowLatencyRefuseParams& params, const device::Block& block,
                                   const LowLatencyTurn& turn, const Peers& peers) {
    const LowLatencyParams& base = params.base;
    const int64_t offset = base.map.header_offset(turn.slot, base.comm.rank);
    DEEPCOMM_NO_UNROLL
    for (int32_t i = block.thread_idx(); i < base.map.num_ranks * base.map.header_packets;
         i += block.size()) {
        const int32_t peer = i / base.map.header_packets, packet = i % base.map.header_packets;
        if (peers.masked[peer] || (kHasNodes && peers.bases[peer] == nullptr)) continue;
        device::st_relaxed_sys(packets_at(peers.bases[peer], offset) + packet,
                               refusal_packet(params, packet, turn.tag));
    }
}

/// The ranks of this node wait for what comes along the rail, whatever this one does. False: leave.
template <typename Shared>
DEEPCOMM_DEVICE bool pass_on_beside_refusal(const LowLatencyParams& params,
                                            const device::Block& block, const RailHeaders& headers,
                                            Shared& shared) {
    const bool goes_on =
        await_rail(params, block, headers, &shared.peers, [](int32_t, const Vec128&) {});
    return goes_on && pass_on_headers(params, block, headers, shared.peers,
                                      [](int32_t, int32_t, const Vec128&) {});
}

}  // namespace low_latency

template <bool kHasNodes>
__global__ void __launch_bounds__(256, 1)
    low_latency_refuse(const __grid_constant__ LowLatencyRefuseParams params) {
    using namespace low_latency;
    const LowLatencyParams& base = params.base;
    // A combine of a dispatch that was refused itself takes no turn on any rank.
    if (base.record != nullptr && base.record[base.record_map.is_void]) return;
    const device::Block block;
    auto& shared = device::shared_storage<LowLatencyRefuseShared<kHasNodes>>();
    const Operation operation =
        params.is_combine ? Operation::kLowLatencyCombine : Operation::kLowLatencyDispatch;
    EarlyTurn early(base, block);
    early.load_credits(base);
    const bool has_peers = open_turn<kHasNodes>(base, operation, block, early, &shared.peers);
    if (!block.sync_and(has_peers)) return;  // ORDER: the credits before the headers
    const LowLatencyTurn turn = shared.peers.turn;
    store_refusal<kHasNodes>(params, block, turn, shared.peers);
    if constexpr (kHasNodes) {
        if (!pass_on_beside_refusal(base, block, {operation, turn, shared.refusals}, shared)) {
            return;
        }
    }
    if constexpr (!kHasNodes) leave_all_unread(base, block, turn);
    finish_send<kBothPhases>(base, block, turn);
    finish_receive<kBothPhases>(base, block, turn);
}

}  // namespace deepcomm::kernels
