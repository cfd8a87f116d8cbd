// SPDX-License-Identifier: Apache-2.0
// Epoch reuse: rounds travel through a ring with fewer slots. A slot is written again only after
// its reader's credit, and counters may wrap. Block 0 sends, block 1 receives. PROTOCOLS.md:
// probe_ring.
#pragma once

#include "kernels/probe/common.cuh"

namespace deepcomm::kernels {

DEEPCOMM_DEVICE bool send_round(const RingParams& params, const device::Block& block,
                                int32_t round) {
    const ProbeParams& probe = params.probe;
    const uint32_t epoch = params.first_epoch + static_cast<uint32_t>(round) + 1;
    const int32_t slot = round % params.num_slots;
    bool is_free = true;
    if (block.is_leader()) {
        const uint32_t freed = epoch - static_cast<uint32_t>(params.num_slots);
        const auto site = wait_for_peer(device::Role::kSend, probe.dst_rank, slot);
        // ORDER: pairs with the credit in receive_round: the slot's reads before these writes
        is_free = device::wait_reached_acquire_sys(wait_context(probe), site, params.head, freed);
    }
    if (!block.sync_and(is_free)) return false;  // ORDER: the leader's acquire before the writes
    uint32_t* words = params.dst_slots + slot * probe.num_words;
    for (int32_t i = block.thread_idx(); i < probe.num_words; i += block.size()) {
        words[i] = probe_payload(probe.rank, static_cast<uint32_t>(round), i);
    }
    block.sync();  // ORDER: the writes of all threads before the leader's release
    if (!block.is_leader()) return true;
    device::st_release_sys(params.dst_tail, epoch);  // ORDER: pairs with the wait in receive_round
    return true;
}

DEEPCOMM_DEVICE bool receive_round(const RingParams& params, const device::Block& block,
                                   int32_t round) {
    const ProbeParams& probe = params.probe;
    const uint32_t epoch = params.first_epoch + static_cast<uint32_t>(round) + 1;
    const int32_t slot = round % params.num_slots;
    bool has_arrived = true;
    if (block.is_leader()) {
        const auto site = wait_for_peer(device::Role::kReceive, probe.src_rank, slot);
        // ORDER: pairs with the release in send_round
        has_arrived =
            device::wait_reached_acquire_sys(wait_context(probe), site, params.tail, epoch);
    }
    if (!block.sync_and(has_arrived)) return false;  // ORDER: the leader's acquire before the reads
    const uint32_t* words = params.slots + slot * probe.num_words;
    for (int32_t i = block.thread_idx(); i < probe.num_words; i += block.size()) {
        params.folds[round * probe.num_words + i] = fold(words[i], epoch);
    }
    block.sync();  // ORDER: the reads of all threads before the leader's credit
    if (!block.is_leader()) return true;
    device::st_release_sys(params.src_head, epoch);  // ORDER: pairs with the wait in send_round
    return true;
}

extern "C" __global__ void __launch_bounds__(256)
    probe_ring(const __grid_constant__ RingParams params) {
    const device::Block block;
    const bool is_sender = block.block_idx() == 0;
    for (int32_t round = 0; round < params.probe.num_rounds; ++round) {
        const bool goes_on =
            is_sender ? send_round(params, block, round) : receive_round(params, block, round);
        if (!goes_on) return;
    }
}

}  // namespace deepcomm::kernels
