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

/// Of each peer, in shared memory.
struct Peers {
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
                                 uint64_t expected, const void* address, Poll&& poll) {
    device::WaitContext context = wait_context(params, site.role);
    if (params.mask_late) context.record = nullptr;  // no failure
    if (device::wait_until(context, site, expected, address, poll)) return Arrival::kHere;
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

// ---- ends

/// Tells every peer, masked ones too, that this rank has read what came in this turn. The peers'
/// addresses are in shared memory: loaded one after the other, they would be what a launch ends with.
/// Over several nodes those that this rank shares neither node nor rail with have none.
template <bool kHasNodes>
DEEPCOMM_DEVICE void pass_on_credits(const LowLatencyParams& params, const LowLatencyTurn& turn,
                                     const Peers& peers) {
    device::fence_acq_rel_sys();  // ORDER: acquires all blocks' arrivals, releases the credits
    const int64_t offset = params.map.credit_offset(turn.slot, params.comm.rank);
    DEEPCOMM_NO_UNROLL
    for (int32_t peer = 0; peer < params.map.num_ranks; ++peer) {
        if (kHasNodes && peers.bases[peer] == nullptr) continue;
        auto* credit = reinterpret_cast<uint64_t*>(peers.bases[peer] + offset);
        device::st_relaxed_sys(credit, turn.number);
    }
}

/// The block's last step of a launch that sends; one block passes the turn on.
DEEPCOMM_DEVICE void finish_send(const LowLatencyParams& params, const device::Block& block,
                                 const LowLatencyTurn& turn) {
    if (!block.is_leader()) return;
    const auto last = static_cast<uint32_t>(block.num_blocks() - 1);
    uint32_t* num_finished = &params.state->num_send_finished;
    // ORDER: this block's reads of the state before the last block's write
    const bool is_last = device::atom_add_acq_rel_gpu(num_finished, 1u) == last;
    if (!is_last) return;
    device::st_relaxed_gpu(num_finished, 0u);  // the next launch starts after this one
    params.state->last = turn;
    *params.turn = turn;
}

/// The thread that ends the receive phase of its block: in the warp that has the fewest packets.
DEEPCOMM_DEVICE bool ends_receive(const device::Block& block) {
    return block.thread_idx() == block.size() - 1;
}

/// Called once all threads of the block have met after their last read of the operation. Gives how
/// many blocks have arrived before, which end_receive needs: the answer takes a trip to memory.
DEEPCOMM_DEVICE uint32_t arrive_receive(const LowLatencyParams& params, const device::Block& block,
                                        const LowLatencyTurn& turn) {
    if (!ends_receive(block)) return 0;
    uint32_t* num_finished = &params.state->num_receive_finished[turn.slot];
    // ORDER: this block's reads; pairs with the fence of the last block, in pass_on_credits
    return device::atom_add_release_gpu(num_finished, 1u);
}

/// The block's last step of a launch that receives; what it has written since its arrival is the
/// kernel's end's to publish. The last block's passes on the credits.
template <int kPhases>
DEEPCOMM_DEVICE void end_receive(const LowLatencyParams& params, const device::Block& block,
                                 const LowLatencyTurn& turn, const Peers& peers,
                                 uint32_t num_before) {
    const auto last = static_cast<uint32_t>(block.num_blocks() - 1);
    if (!ends_receive(block) || num_before != last) return;
    // The slot's next turn starts after this one.
    device::st_relaxed_gpu(&params.state->num_receive_finished[turn.slot], 0u);
    pass_on_credits<(kPhases & kOverNodes) != 0>(params, turn, peers);
    if (kPhases & kSendPhase) params.state->last = turn;
}

/// Both, for a block that has nothing to write meanwhile.
template <int kPhases>
DEEPCOMM_DEVICE void finish_receive(const LowLatencyParams& params, const device::Block& block,
                                    const LowLatencyTurn& turn, const Peers& peers) {
    end_receive<kPhases>(params, block, turn, peers, arrive_receive(params, block, turn));
}

}  // namespace deepcomm::kernels::low_latency
