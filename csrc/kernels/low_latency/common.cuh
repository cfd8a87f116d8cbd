// SPDX-License-Identifier: Apache-2.0
// What both low-latency operations share: waits, credits, and how a phase ends; see also peers.cuh.
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

/// Where it is noted that a turn has left rows of a peer unread: there is its number then; behind those of the ranks,
/// of any. A slot's turns take two words each in turn, 0 and 1, as blocks make notes of one while others still look at
/// those of the one before.
DEEPCOMM_DEVICE uint64_t* unread_word(const LowLatencyParams& params, int32_t slot, int32_t word,
                                      int32_t peer) {
    return params.unread + (slot * 2 + word) * (params.map.num_ranks + 1) + peer;
}

/// That of a turn. Numbers in a slot are num_slots apart: the bit above its zeros changes from one to the next.
DEEPCOMM_DEVICE uint64_t* unread_of(const LowLatencyParams& params, int32_t slot, uint64_t number,
                                    int32_t peer) {
    const int32_t zeros = device::lowest_bit(static_cast<uint32_t>(params.map.num_slots));
    return unread_word(params, slot, static_cast<int32_t>(number >> zeros & 1), peer);
}

/// Notes that nobody reads the rows of a peer that have come in a turn, or may come yet.
DEEPCOMM_DEVICE void leave_unread(const LowLatencyParams& params, const LowLatencyTurn& turn,
                                  int32_t peer) {
    device::st_relaxed_gpu(unread_of(params, turn.slot, turn.number, peer), turn.number);
    device::st_relaxed_gpu(unread_of(params, turn.slot, turn.number, params.map.num_ranks),
                           turn.number);
}

/// The same of all peers. A block meets before it ends the phase, unless the launch does both.
DEEPCOMM_DEVICE void leave_all_unread(const LowLatencyParams& params, const device::Block& block,
                                      const LowLatencyTurn& turn) {
    DEEPCOMM_NO_UNROLL
    for (int32_t peer = block.thread_idx(); peer < params.map.num_ranks; peer += block.size()) {
        leave_unread(params, turn, peer);
    }
}

/// Skips a peer from now on, because it is late.
template <bool kHasNodes>
DEEPCOMM_DEVICE void mask_late_peer(const LowLatencyParams& params, const LowLatencyTurn& turn,
                                    int32_t peer) {
    if constexpr (!kHasNodes) leave_unread(params, turn, peer);
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

// ---- ends

/// Of `num_receive_finished`, once all blocks have added to it: the first adds what then makes this.
constexpr uint32_t kAllFinished = 0x80000000u;

/// The thread that ends a receive phase for its block: of the warp that has the fewest packets.
DEEPCOMM_DEVICE bool ends_receive(const device::Block& block) {
    return block.thread_idx() == block.size() - 1;
}

/// A block's end of a receive phase, once all of its threads have met after their last read of the
/// operation. Nothing is awaited here, nor are the peers told: a kernel would end later for it. What a
/// block writes afterwards is the kernel's end's to publish.
template <int kPhases>
DEEPCOMM_DEVICE void finish_receive(const LowLatencyParams& params, const device::Block& block,
                                    const LowLatencyTurn& turn) {
    if (!ends_receive(block)) return;
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

/// An operation that this rank has read and told nobody of.
struct Received {
    uint64_t number;  ///< 0: none
    bool has_unread;  ///< rows of it, of any peer
};

/// Who gets that of a slot tells the peers; the slot's next operation cannot come before that.
DEEPCOMM_DEVICE Received claim_received(const LowLatencyParams& params, int32_t slot) {
    uint32_t* num_finished = &params.state->num_receive_finished[slot];
    // ORDER: pairs with the release in finish_receive: all blocks' reads before the credits
    const uint32_t found = device::ld_acquire_gpu(num_finished);
    if (found != kAllFinished) return {0, false};
    // Blocks that wait for credits look for it, too.
    if (device::atom_cas_relaxed_gpu(num_finished, found, 0u) != found) return {0, false};
    const uint64_t number = device::ld_relaxed_gpu(&params.state->received[slot]);
    if (params.unread == nullptr) return {number, false};
    // Both words of the slot, beside the number that says which.
    const int32_t any = params.map.num_ranks;
    const uint64_t first = device::ld_relaxed_gpu(unread_word(params, slot, 0, any));
    const uint64_t second = device::ld_relaxed_gpu(unread_word(params, slot, 1, any));
    return {number, first == number || second == number};
}

/// What a peer has read so far in a slot.
DEEPCOMM_DEVICE const uint64_t* credit_of(const LowLatencyParams& params, int32_t slot,
                                          int32_t peer) {
    return reinterpret_cast<const uint64_t*>(params.local + params.map.credit_offset(slot, peer));
}

DEEPCOMM_DEVICE uint64_t read_credit(const uint64_t* credit) {
    // ORDER: pairs with the fence in store_credits: the peer's reads before our stores
    const uint64_t received = device::ld_acquire_sys(credit);
    return received;
}

/// Tells a peer, unless it has no address.
DEEPCOMM_DEVICE void store_credit(const LowLatencyParams& params, int32_t slot, int32_t peer,
                                  uint64_t credit) {
    unsigned char* base = params.credit_bases[peer];
    if (base == nullptr) return;
    const int64_t offset = params.map.credit_offset(slot, params.comm.rank);
    device::st_relaxed_sys(reinterpret_cast<uint64_t*>(base + offset), credit);
}

/// Tells every peer, masked ones too, what this rank has read in a slot, and whether it has left rows of it unread.
/// Over several nodes those that this rank shares neither node nor rail with have no address.
template <typename Group>
DEEPCOMM_DEVICE void store_credits(const LowLatencyParams& params, const Group& group, int32_t slot,
                                   const Received& received) {
    const uint64_t number = received.number;
    device::fence_acq_rel_sys();  // ORDER: releases what the claim has acquired
    DEEPCOMM_NO_UNROLL
    for (int32_t peer = group.thread_idx(); peer < params.map.num_ranks; peer += group.size()) {
        uint64_t credit = number;
        if (received.has_unread) {
            if (peer == params.comm.rank) continue;
            const uint64_t noted = device::ld_relaxed_gpu(unread_of(params, slot, number, peer));
            if (noted == number) credit |= layout::kUnread;
        }
        store_credit(params, slot, peer, credit);
    }
    if (!received.has_unread) return;
    // Its own one lets this rank's blocks clear those rows, and tell the peers of it.
    device::fence_acq_rel_sys();  // ORDER: what peers are told now before what they are told then
    group.sync();
    if (group.is_leader()) {
        store_credit(params, slot, params.comm.rank, number | layout::kUnread);
    }
}

/// A thread gives the credits of a slot, if they are due.
DEEPCOMM_DEVICE void give_credits_of(const LowLatencyParams& params, int32_t slot) {
    const Received received = claim_received(params, slot);
    if (received.number != 0) store_credits(params, device::Thread{}, slot, received);
}

/// A warp gives the credits of all slots that are due.
DEEPCOMM_DEVICE void give_credits(const LowLatencyParams& params, const device::Warp& warp) {
    DEEPCOMM_NO_UNROLL
    for (int32_t begin = 0; begin < params.map.num_slots; begin += warp.size()) {
        const int32_t slot = begin + warp.thread_idx();
        Received mine = {0, false};
        if (slot < params.map.num_slots) mine = claim_received(params, slot);
        const uint32_t unread = device::warp_ballot(mine.has_unread);
        uint32_t due = device::warp_ballot(mine.number != 0);
        warp.sync();  // ORDER: what a lane has acquired, to the lanes that tell of it
        DEEPCOMM_NO_UNROLL
        for (; due != 0; due &= due - 1) {
            const int32_t lane = device::lowest_bit(due);
            const Received received = {device::warp_shuffle(mine.number, lane),
                                       (unread >> lane & 1) != 0};
            store_credits(params, warp, begin + lane, received);
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
