// SPDX-License-Identifier: Apache-2.0
// What both low-latency operations share: waits, packets, and how a phase ends; see also peers.cuh.
// PROTOCOLS.md: low latency.
#pragma once

#include "device/device.cuh"
#include "kernels/low_latency/params.hpp"

namespace deepcomm::kernels {

// Blocks that shall be resident on an SM: leaves each thread of 256 some 80 or 128 registers.
constexpr int kLowLatencyDispatchBlocks = 3;
constexpr int kLowLatencyCombineBlocks = 2;

/// Of a dispatch: fewer where long rows are both passed on and received, which else spills.
constexpr int low_latency_dispatch_blocks(int rows, int phases) {
    const bool is_long = rows == static_cast<int>(LowLatencyRows::kBf16);
    return is_long && phases == (kReceivePhase | kOverNodes) ? 2 : kLowLatencyDispatchBlocks;
}

}  // namespace deepcomm::kernels

namespace deepcomm::kernels::low_latency {

using device::Vec128;
using layout::LowLatencyTurn;
using layout::Operation;

/// Of each peer, in shared memory; and of an operation that sends, whose turn it is.
struct Peers {
    LowLatencyTurn turn;
    unsigned char* bases[layout::kMaxLowLatencyRanks];
    uint32_t masked[layout::kMaxLowLatencyRanks];
};

/// The last warp has roles of its own: it has fewer packets than the first.
DEEPCOMM_DEVICE bool is_in_last_warp(const device::Block& block) {
    return block.thread_idx() >= block.size() - device::kWarpSize;
}

/// How a wait for a peer ended; after kFailed the block leaves and signals nobody.
enum class Arrival { kHere, kAbsent, kFailed };

DEEPCOMM_DEVICE device::WaitContext wait_context(const LowLatencyParams& params,
                                                 device::Role role) {
    const CommParams& comm = params.comm;
    const uint64_t timeout_ns = params.timeouts_ns[static_cast<int32_t>(role)];
    return {comm.record, timeout_ns, comm.rank, comm.names, comm.failed};
}

/// Skips a peer from now on, because it is late.
DEEPCOMM_DEVICE void mask_late_peer(const LowLatencyParams& params, int32_t peer) {
    device::st_relaxed_gpu(&params.rank_mask[peer], 1u);
    device::st_relaxed_sys(&params.late_ranks[peer], 1u);
}

/// The bounded wait of these kernels: a late peer fails the operation, or is absent.
template <typename Poll>
DEEPCOMM_DEVICE Arrival wait_for(const LowLatencyParams& params, const device::WaitSite& site,
                                 uint64_t expected, const void* address, Poll&& poll,
                                 const void* other = nullptr) {
    device::WaitContext context = wait_context(params, site.role);
    if (params.mask_late) context.record = nullptr;  // no failure
    if (device::wait_until(context, site, expected, address, poll, other)) return Arrival::kHere;
    return params.mask_late ? Arrival::kAbsent : Arrival::kFailed;
}

// ---- packets

DEEPCOMM_DEVICE Vec128* packets_at(unsigned char* base, int64_t offset) {
    return reinterpret_cast<Vec128*>(base + offset);
}

/// Word part of a packet, without an array in memory.
DEEPCOMM_DEVICE uint32_t payload_word(const Vec128& packet, int32_t part) {
    return part == 0 ? packet.words[0] : part == 1 ? packet.words[1] : packet.words[2];
}

/// Polls one packet until it carries the tag.
DEEPCOMM_DEVICE Arrival wait_packet(const LowLatencyParams& params, const device::WaitSite& site,
                                    const Vec128* address, uint32_t tag, Vec128* packet) {
    return wait_for(params, site, tag, address, [&]() -> device::Observed {
        *packet = device::ld_relaxed_sys(address);
        return {packet->words[3], packet->words[3] == tag};
    });
}

/// The same for a packet without which the operation fails in any case. False: leave.
DEEPCOMM_DEVICE bool must_arrive(const LowLatencyParams& params, const device::WaitSite& site,
                                 const Vec128* address, uint32_t tag, Vec128* packet) {
    const device::WaitContext context = wait_context(params, site.role);
    return device::wait_until(context, site, tag, address, [&]() -> device::Observed {
        *packet = device::ld_relaxed_sys(address);
        return {packet->words[3], packet->words[3] == tag};
    });
}

/// A row of packets that threads take in turns, stride apart.
struct PacketRange {
    const Vec128* packets;
    int32_t stride;
    int32_t num;
};

/// Packets first, first + stride, ... of a range: all loads fly before the first is tested.
template <int kCount>
struct PacketBatch {
    Vec128 packets[kCount];

    DEEPCOMM_DEVICE void load(const PacketRange& range, int32_t first) {
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kCount; ++i) {
            const int32_t index = first + i * range.stride;
            if (index < range.num) packets[i] = device::ld_relaxed_sys(range.packets + index);
        }
    }

    /// Whether packet i, which a load has brought, is not of this turn yet.
    DEEPCOMM_DEVICE bool is_missing(int32_t i, const PacketRange& range, int32_t first,
                                    uint32_t tag) const {
        return first + i * range.stride < range.num && packets[i].words[3] != tag;
    }

    /// Loads those again that had not arrived: all loads fly before the first is tested.
    DEEPCOMM_DEVICE void reload(const PacketRange& range, int32_t first, uint32_t tag) {
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kCount; ++i) {
            const Vec128* packet = range.packets + first + i * range.stride;
            if (is_missing(i, range, first, tag)) packets[i] = device::ld_relaxed_sys(packet);
        }
    }

    /// Polls those that had not arrived, all of them together: one after the other, each would cost
    /// the latency of a load, although it has arrived meanwhile.
    DEEPCOMM_DEVICE Arrival wait(const LowLatencyParams& params, const device::WaitSite& site,
                                 const PacketRange& range, int32_t first, uint32_t tag) {
        DEEPCOMM_NO_UNROLL
        while (true) {
            int32_t awaited = kCount;
            DEEPCOMM_UNROLL
            for (int32_t i = kCount - 1; i >= 0; --i) {
                if (is_missing(i, range, first, tag)) awaited = i;
            }
            if (awaited == kCount) return Arrival::kHere;
            const Vec128* address = range.packets + first + awaited * range.stride;
            const Arrival arrival = wait_for(params, site, tag, address, [&]() -> device::Observed {
                reload(range, first, tag);
                uint32_t observed = tag;
                DEEPCOMM_UNROLL
                for (int32_t i = 0; i < kCount; ++i) {
                    if (i == awaited) observed = packets[i].words[3];
                }
                return {observed, observed == tag};
            });
            if (arrival != Arrival::kHere) return arrival;
        }
    }
};

/// Fills packets first, first + threads, ... of a row with words that are staged in shared memory.
template <typename Spec, int kCount>
DEEPCOMM_DEVICE void fill_packets(const uint32_t* staged, int32_t first, uint32_t tag,
                                  PacketBatch<kCount>* batch) {
    DEEPCOMM_UNROLL
    for (int32_t i = 0; i < kCount; ++i) {
        const int32_t index = first + i * Spec::kNumThreads;
        if (index >= Spec::kPackets) continue;
        const uint32_t* words = staged + index * layout::kPacketWords;
        batch->packets[i] = {{words[0], words[1], words[2], tag}};
    }
}

/// Stores them.
template <typename Spec, int kCount>
DEEPCOMM_DEVICE void store_packets(const PacketBatch<kCount>& batch, int32_t first,
                                   Vec128* packets) {
    DEEPCOMM_UNROLL
    for (int32_t i = 0; i < kCount; ++i) {
        const int32_t index = first + i * Spec::kNumThreads;
        if (index < Spec::kPackets) device::st_relaxed_sys(packets + index, batch.packets[i]);
    }
}

// ---- ends

/// Of `num_receive_finished`, once all blocks have added to it: the first adds what then makes this.
constexpr uint32_t kAllFinished = 0x80000000u;

/// A block's end of a receive phase, once all of its threads have met after their last read of the
/// operation. Nothing is awaited here, nor are the peers told: a kernel would end later for it. What a
/// block writes afterwards is the kernel's end's to publish.
template <int kPhases>
DEEPCOMM_DEVICE void finish_receive(const LowLatencyParams& params, const device::Block& block,
                                    const LowLatencyTurn& turn) {
    if (block.thread_idx() != block.size() - 1) return;  // of the warp that has the fewest packets
    uint32_t num = 1;
    if (block.block_idx() == 0) {
        device::st_relaxed_gpu(&params.state->received[turn.slot], turn.number);
        num = kAllFinished - static_cast<uint32_t>(block.num_blocks() - 1);
    }
    uint32_t* num_finished = &params.state->num_receive_finished[turn.slot];
    if (kPhases & kSendPhase) {
        // The next launch that sends, which looks at it, comes after this one.
        device::red_add_relaxed_gpu(num_finished, num);
    } else {
        // ORDER: this block's reads, and whose turn it was; pairs with the acquire in claim_received
        device::red_add_release_gpu(num_finished, num);
    }
}

/// The number of the operation that this rank has read in a slot and told nobody of, 0 for none. Who gets
/// it tells the peers; the slot's next operation cannot come before that.
DEEPCOMM_DEVICE uint64_t claim_received(const LowLatencyParams& params, int32_t slot) {
    uint32_t* num_finished = &params.state->num_receive_finished[slot];
    // ORDER: pairs with the release in finish_receive: all blocks' reads before the credits
    const uint32_t found = device::ld_acquire_gpu(num_finished);
    if (found != kAllFinished) return 0;
    // Blocks that wait for credits look for it, too.
    if (device::atom_cas_relaxed_gpu(num_finished, found, 0u) != found) return 0;
    return device::ld_relaxed_gpu(&params.state->received[slot]);
}

/// Tells every peer, masked ones too, what this rank has read in a slot. Over several nodes those that
/// this rank shares neither node nor rail with have no address.
template <typename Group>
DEEPCOMM_DEVICE void store_credits(const LowLatencyParams& params, const Group& group, int32_t slot,
                                   uint64_t number) {
    const int64_t offset = params.map.credit_offset(slot, params.comm.rank);
    device::fence_acq_rel_sys();  // ORDER: releases what the claim has acquired
    DEEPCOMM_NO_UNROLL
    for (int32_t peer = group.thread_idx(); peer < params.map.num_ranks; peer += group.size()) {
        unsigned char* base = params.credit_bases[peer];
        if (base == nullptr) continue;
        device::st_relaxed_sys(reinterpret_cast<uint64_t*>(base + offset), number);
    }
}

/// A thread gives the credits of a slot, if they are due.
DEEPCOMM_DEVICE void give_credits_of(const LowLatencyParams& params, int32_t slot) {
    const uint64_t number = claim_received(params, slot);
    if (number != 0) store_credits(params, device::Thread{}, slot, number);
}

/// A warp gives the credits of all slots that are due.
DEEPCOMM_DEVICE void give_credits(const LowLatencyParams& params, const device::Warp& warp) {
    DEEPCOMM_NO_UNROLL
    for (int32_t begin = 0; begin < params.map.num_slots; begin += warp.size()) {
        const int32_t slot = begin + warp.thread_idx();
        const uint64_t number = slot < params.map.num_slots ? claim_received(params, slot) : 0;
        uint32_t due = device::warp_ballot(number != 0);
        warp.sync();  // ORDER: what a lane has acquired, to the lanes that tell of it
        DEEPCOMM_NO_UNROLL
        for (; due != 0; due &= due - 1) {
            const int32_t lane = device::lowest_bit(due);
            store_credits(params, warp, begin + lane, device::warp_shuffle(number, lane));
        }
    }
}

/// A block's end of a send phase, all of whose threads know the turn. Credits of earlier operations are
/// given here, where nobody waits: by the last block but one, which is among the last to have tokens and, unless
/// it is alone, sends no headers.
template <int kPhases>
DEEPCOMM_DEVICE void finish_send(const LowLatencyParams& params, const device::Block& block,
                                 const LowLatencyTurn& turn) {
    const int32_t num_blocks = block.num_blocks();
    if (block.is_leader()) {
        const bool is_first = block.block_idx() == 0;
        const auto num_others = static_cast<uint64_t>(num_blocks - 1);
        device::red_add_relaxed_gpu(&params.state->sends,
                                    is_first ? layout::kSendUnit - num_others : uint64_t{1});
        if (is_first && (kPhases & kReceivePhase) == 0) *params.turn = turn;
    }
    const bool gives = block.block_idx() == (num_blocks == 1 ? 0 : num_blocks - 2);
    if (gives && is_in_last_warp(block)) give_credits(params, device::Warp{});
}

}  // namespace deepcomm::kernels::low_latency
