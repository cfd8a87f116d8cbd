// SPDX-License-Identifier: Apache-2.0
// Flag with data: each strong 16-byte store carries 12 bytes of payload and its round, so nothing
// else has to be ordered. Two copies of the region alternate: a rank sends round n + 2 only after
// it has heard round n + 1, which the peer sent after reading round n. PROTOCOLS.md: probe_packet.
#pragma once

#include "kernels/probe/common.cuh"

namespace deepcomm::kernels {

DEEPCOMM_DEVICE device::Vec128* packets_of(void* packets, const PacketParams& params,
                                           uint32_t round) {
    return static_cast<device::Vec128*>(packets) + (round & 1) * params.num_packets;
}

DEEPCOMM_DEVICE void send_packet(const PacketParams& params, uint32_t round, int32_t index) {
    const uint32_t value = probe_payload(params.probe.rank, round, index);
    const device::Vec128 packet = {{value, value + 1, value + 2, round}};
    device::st_relaxed_sys(packets_of(params.dst_packets, params, round) + index, packet);
}

DEEPCOMM_DEVICE bool receive_packet(const PacketParams& params, uint32_t round, int32_t index) {
    const device::Vec128* address = packets_of(params.packets, params, round) + index;
    const auto site = wait_for_peer(device::Role::kReceive, params.probe.src_rank, index);
    device::Vec128 packet{};
    const bool has_arrived = device::wait_until(
        wait_context(params.probe), site, round, address, [&]() -> device::Observed {
            packet = device::ld_relaxed_sys(address);
            return {packet.words[3], packet.words[3] == round};
        });
    if (!has_arrived) return false;
    params.sums[(round - 1) * static_cast<uint32_t>(params.num_packets) +
                static_cast<uint32_t>(index)] = packet.words[0] + packet.words[1] + packet.words[2];
    return true;
}

extern "C" __global__ void __launch_bounds__(256)
    probe_packet(const __grid_constant__ PacketParams params) {
    const device::Block block;
    const auto num_rounds = static_cast<uint32_t>(params.probe.num_rounds);
    for (uint32_t round = 1; round <= num_rounds; ++round) {
        for (int32_t i = block.thread_idx(); i < params.num_packets; i += block.size()) {
            send_packet(params, round, i);
        }
        for (int32_t i = block.thread_idx(); i < params.num_packets; i += block.size()) {
            if (!receive_packet(params, round, i)) return;
        }
    }
}

}  // namespace deepcomm::kernels
