// SPDX-License-Identifier: Apache-2.0
// Rows that nobody has read, of peers that were skipped or of an operation that was called off. They look
// like those of the slot's next turn, as dense packets have no tag: before it begins they are cleared.
// PROTOCOLS.md: low latency.
#pragma once

#include "kernels/low_latency/packets.cuh"

namespace deepcomm::kernels::low_latency {

/// The number of the slot's last turn.
DEEPCOMM_DEVICE uint64_t last_of(const LowLatencyParams& params, const LowLatencyTurn& turn) {
    return turn.number - static_cast<uint64_t>(params.map.num_slots);
}

/// Whether a peer, by its credit, has left none of that turn's rows unread, or has cleared them since: it may
/// have ended this turn, too.
DEEPCOMM_DEVICE bool is_settled(const LowLatencyParams& params, const LowLatencyTurn& turn,
                                uint64_t credit) {
    return credit != (last_of(params, turn) | layout::kUnread);
}

/// Of an entry of `unread`: a block is about to clear those rows.
constexpr uint64_t kClearing = uint64_t{1} << 63;

/// Whether an entry says that the slot's last turn has left rows that are still there.
DEEPCOMM_DEVICE bool is_due(uint64_t entry, uint64_t last) {
    return entry == last || entry == (last | kClearing);
}

/// A warp clears what a peer has stored in a slot.
DEEPCOMM_DEVICE void clear_rows(const LowLatencyParams& params, const device::Warp& warp,
                                int32_t slot, int32_t peer) {
    Vec128* packets = packets_at(params.local, params.map.row_offset(slot, peer, 0));
    const int64_t num = params.map.max_tokens * params.map.row_stride / layout::kPacketBytes;
    DEEPCOMM_NO_UNROLL
    for (int64_t i = warp.thread_idx(); i < num; i += warp.size()) {
        device::st_relaxed_sys(packets + i, Vec128{});
    }
}

/// Waits until another block of this rank has cleared a peer's rows. That needs nobody else: a peer is not masked
/// for it. False: leave.
DEEPCOMM_DEVICE bool await_cleared(const LowLatencyParams& params, const device::WaitSite& site,
                                   uint64_t last) {
    const uint64_t* entry = unread_of(params, site.slot, last, site.peer);
    return device::wait_until(wait_context(params, site.role), site, 0, entry,
                              [&]() -> device::Observed {
                                  // ORDER: pairs with the release in settle_rows: cleared rows before new ones
                                  const uint64_t found = device::ld_acquire_gpu(entry);
                                  return {found, !is_due(found, last)};
                              });
}

/// The warp clears a peer's rows, which has stored all that it will, and gives the credit that was held back for it;
/// unless another block does, which it then waits for. False: leave.
DEEPCOMM_DEVICE bool settle_rows(const LowLatencyParams& params, const device::Warp& warp,
                                 const device::WaitSite& site, const LowLatencyTurn& turn) {
    const uint64_t last = last_of(params, turn);
    uint64_t* entry = unread_of(params, site.slot, last, site.peer);
    bool clears = false, goes_on = true;
    if (warp.is_leader()) {
        clears = device::atom_cas_relaxed_gpu(entry, last, last | kClearing) == last;
        if (!clears) goes_on = await_cleared(params, site, last);
    }
    if (device::warp_ballot(clears) == 0) return warp.sync_and(goes_on);
    clear_rows(params, warp, turn.slot, site.peer);
    warp.sync();  // ORDER: cleared rows, to the leader
    if (!warp.is_leader()) return true;
    device::fence_acq_rel_sys();  // ORDER: cleared rows before the peer's new ones
    // This rank's own credit goes on to tell its blocks that there was something to clear.
    if (site.peer != params.comm.rank) store_credit(params, turn.slot, site.peer, last);
    // ORDER: cleared rows, to the blocks that wait
    device::st_release_gpu(entry, uint64_t{0});
    return true;
}

/// Waits until a peer has cleared what it has left unread of this rank's.
DEEPCOMM_DEVICE Arrival await_settled(const LowLatencyParams& params, const device::WaitSite& site,
                                      const LowLatencyTurn& turn) {
    const uint64_t* credit = credit_of(params, turn.slot, site.peer);
    return wait_for(params, site, last_of(params, turn), credit, [&]() -> device::Observed {
        const uint64_t found = read_credit(credit);
        return {found, is_settled(params, turn, found)};
    });
}

/// The last warp, once all peers that are not masked have ended the slot's last turn: sees to it that no rows
/// of that turn are left, neither here nor at the peers. False: leave.
DEEPCOMM_DEVICE bool settle_turn(const LowLatencyParams& params, Operation operation,
                                 const LowLatencyTurn& turn, Peers* peers) {
    const device::Warp warp;
    const int32_t num_ranks = params.map.num_ranks;
    const uint64_t last = last_of(params, turn);
    bool goes_on = true;
    DEEPCOMM_NO_UNROLL
    for (int32_t begin = 0; begin < num_ranks; begin += warp.size()) {
        const int32_t mine = begin + warp.thread_idx();
        const bool is_there = mine < num_ranks && !peers->masked[mine];
        const uint64_t* entry = unread_of(params, turn.slot, last, is_there ? mine : 0);
        // ORDER: pairs with the release in settle_rows: cleared rows before new ones
        const uint64_t found = device::ld_acquire_gpu(entry);
        DEEPCOMM_NO_UNROLL
        for (uint32_t due = device::warp_ballot(is_there && is_due(found, last)); due != 0;
             due &= due - 1) {
            const int32_t peer = begin + device::lowest_bit(due);
            const device::WaitSite site = {operation, device::Role::kSend, peer, turn.slot};
            goes_on = settle_rows(params, warp, site, turn) && goes_on;
        }
    }
    DEEPCOMM_NO_UNROLL
    for (int32_t peer = warp.thread_idx(); peer < num_ranks; peer += warp.size()) {
        if (peers->masked[peer] || peer == params.comm.rank) continue;
        const device::WaitSite site = {operation, device::Role::kSend, peer, turn.slot};
        const Arrival arrival = await_settled(params, site, turn);
        goes_on = goes_on && arrival != Arrival::kFailed;
        if (arrival != Arrival::kAbsent) continue;
        mask_late_peer<false>(params, turn, peer);
        peers->masked[peer] = 1;
    }
    return goes_on;
}

}  // namespace deepcomm::kernels::low_latency
