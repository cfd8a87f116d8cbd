// SPDX-License-Identifier: Apache-2.0
// Message passing: every block of a rank writes its part of the payload to the peer by plain
// stores and adds to the peer's signal; the peer's blocks wait for all of them. PROTOCOLS.md:
// probe_signal.
#pragma once

#include "kernels/probe/common.cuh"

namespace deepcomm::kernels {

DEEPCOMM_DEVICE void send_payload(const SignalParams& params, const device::Block& block,
                                  int32_t round) {
    const ProbeParams& probe = params.probe;
    uint32_t* row = params.dst_payload + round * probe.num_words;
    const int32_t stride = block.size() * block.num_blocks();
    const int32_t first = block.block_idx() * block.size() + block.thread_idx();
    for (int32_t i = first; i < probe.num_words; i += stride) {
        row[i] = probe_payload(probe.rank, static_cast<uint32_t>(round), i);
    }
    block.sync();  // ORDER: the payload of all threads before the leader's release
    if (!block.is_leader()) return;
    // ORDER: pairs with the wait in receive_payload
    device::red_add_release_sys(params.dst_signal, 1u);
}

DEEPCOMM_DEVICE bool receive_payload(const SignalParams& params, const device::Block& block,
                                     int32_t round) {
    const ProbeParams& probe = params.probe;
    bool has_arrived = true;
    if (block.is_leader()) {
        const auto expected = static_cast<uint32_t>((round + 1) * block.num_blocks());
        const auto site = wait_for_peer(device::Role::kReceive, probe.src_rank, round);
        // ORDER: pairs with the releases in send_payload, of all blocks
        has_arrived =
            device::wait_reached_acquire_sys(wait_context(probe), site, params.signal, expected);
    }
    if (!block.sync_and(has_arrived)) return false;  // ORDER: the leader's acquire before the reads
    const uint32_t* row = params.payload + round * probe.num_words;
    uint32_t sum = 0;
    for (int32_t i = block.thread_idx(); i < probe.num_words; i += block.size()) sum += row[i];
    const device::Warp warp;
    sum = device::warp_sum(sum);
    uint32_t* sums = params.sums + round * block.num_blocks() + block.block_idx();
    if (warp.is_leader()) device::red_add_relaxed_gpu(sums, sum);
    return true;
}

extern "C" __global__ void __launch_bounds__(256)
    probe_signal(const __grid_constant__ SignalParams params) {
    const device::Block block;
    for (int32_t round = 0; round < params.probe.num_rounds; ++round) {
        send_payload(params, block, round);
        if (!receive_payload(params, block, round)) return;
    }
}

}  // namespace deepcomm::kernels
