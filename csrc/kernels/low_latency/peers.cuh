// SPDX-License-Identifier: Apache-2.0
// Whose turn it is, the peers, and whether they have read what this rank sent in the turn's slot.
// PROTOCOLS.md: low latency.
#pragma once

#include "kernels/low_latency/nodes.cuh"
#include "kernels/low_latency/unread.cuh"

namespace deepcomm::kernels::low_latency {

/// Finds the peers of a turn that another launch has sent, and whether they are masked; the group's threads share
/// the work. The block meets before others use them.
template <bool kHasNodes, typename Group>
DEEPCOMM_DEVICE void find_peers(const LowLatencyParams& params, const Group& group,
                                const LowLatencyTurn& turn, Peers* peers) {
    for (int32_t peer = group.thread_idx(); peer < params.map.num_ranks; peer += group.size()) {
        peers->bases[peer] = params.comm.bases[peer];
        // Another block may mask a late peer at this moment.
        peers->masked[peer] = device::ld_relaxed_gpu(&params.rank_mask[peer]);
        if constexpr (!kHasNodes) {
            // Whom the other launch has skipped stays skipped: its rows may be those of an earlier turn.
            const uint64_t skipped =
                device::ld_relaxed_gpu(unread_of(params, turn.slot, turn.number, peer));
            peers->masked[peer] |= skipped == turn.number ? 1u : 0u;
            if (peers->masked[peer]) leave_unread(params, turn, peer);
        }
    }
}

/// Whether a peer has ended the last turn of the turn's slot, by its credit.
DEEPCOMM_DEVICE bool is_free(const LowLatencyParams& params, const LowLatencyTurn& turn,
                             uint64_t credit) {
    const uint64_t received = credit & ~layout::kUnread;
    return received + static_cast<uint64_t>(params.map.num_slots) >= turn.number;
}

/// A peer and its credit in one slot, as a lane of the last warp sees them before the turn is known,
/// which says whose slot matters. Items are all slots of all peers; each lane's first is looked up early.
struct EarlyPeer {
    int32_t peer = 0;
    int32_t slot = -1;
    unsigned char* base = nullptr;
    uint32_t masked = 0;
    uint64_t received = 0;  ///< its credit

    DEEPCOMM_DEVICE void load(const LowLatencyParams& params, int32_t item) {
        slot = item / params.map.num_ranks;
        peer = item % params.map.num_ranks;
        if (slot >= params.map.num_slots) return;
        base = params.comm.bases[peer];
        masked = device::ld_relaxed_gpu(&params.rank_mask[peer]);
    }

    /// Behind all that is on its way: an acquire holds up the thread's next loads until it is here.
    DEEPCOMM_DEVICE void load_credit(const LowLatencyParams& params) {
        if (slot < 0 || slot >= params.map.num_slots) return;
        received = read_credit(credit_of(params, slot, peer));
    }
};

/// The turn of the operation that a launch sends, by what it has found.
DEEPCOMM_DEVICE LowLatencyTurn turn_of_launch(const LowLatencyParams& params, uint64_t sends) {
    return layout::turn_of(sends / layout::kSendUnit + 1, params.map.num_slots);
}

/// The same for launches that take no turn themselves.
DEEPCOMM_DEVICE LowLatencyTurn turn_of_launch(const LowLatencyParams& params) {
    return turn_of_launch(params, device::ld_relaxed_gpu(&params.state->sends));
}

/// Waits until a peer has read what this rank sent in the slot's last turn, unless it is masked. Who waits
/// gives the credits of that turn meanwhile, if they are due: peers wait for these, as this rank does.
/// has_failed: nobody waits any more.
template <bool kHasNodes>
DEEPCOMM_DEVICE bool open_peer(const LowLatencyParams& params, Operation operation,
                               const LowLatencyTurn& turn, EarlyPeer& early, bool has_failed,
                               Peers* peers) {
    uint32_t masked = early.masked;
    bool goes_on = !has_failed;
    const bool is_written = !kHasNodes || early.base != nullptr;
    if (goes_on && is_written && !is_free(params, turn, early.received) && !masked) {
        const uint64_t* credit = credit_of(params, turn.slot, early.peer);
        const device::WaitSite site = {operation, device::Role::kSend, early.peer, turn.slot};
        const auto poll = [&]() -> device::Observed {
            give_credits_of(params, turn.slot);
            early.received = read_credit(credit);
            return {early.received, is_free(params, turn, early.received)};
        };
        const uint32_t* num_finished = &params.state->num_receive_finished[turn.slot];
        const Arrival arrival =
            wait_for(params, site, last_of(params, turn), credit, poll, num_finished);
        goes_on = arrival != Arrival::kFailed;
        if (arrival == Arrival::kAbsent) {
            mask_late_peer<kHasNodes>(params, turn, early.peer);
            masked = 1;
        }
    }
    if (!kHasNodes && early.masked) leave_unread(params, turn, early.peer);
    peers->bases[early.peer] = early.base;
    peers->masked[early.peer] = masked;
    return goes_on;
}

/// What the last warp looks up at a launch's begin: the peers beside the turn, then their credits.
struct EarlyTurn {
    EarlyPeer peer;
    uint64_t sends = 0;
    uint32_t failed = 0;  ///< a launch before has: nobody knows whose turn it is

    DEEPCOMM_DEVICE EarlyTurn(const LowLatencyParams& params, const device::Block& block) {
        if (!is_in_last_warp(block)) return;
        peer.load(params, device::Warp{}.thread_idx());
        sends = device::ld_relaxed_gpu(&params.state->sends);
        failed = device::ld_relaxed_gpu(params.comm.failed);
    }

    DEEPCOMM_DEVICE void load_credits(const LowLatencyParams& params) { peer.load_credit(params); }
};

/// Begins an operation. The last warp: says whose turn it is and which peers there are, and waits for those
/// that are not masked. The block meets before other warps use it. False: leave.
template <bool kHasNodes>
DEEPCOMM_DEVICE bool open_turn(const LowLatencyParams& params, Operation operation,
                               const device::Block& block, const EarlyTurn& found, Peers* peers) {
    if (!is_in_last_warp(block)) return true;
    const int32_t lane = device::Warp{}.thread_idx();
    EarlyPeer early = found.peer;
    const LowLatencyTurn turn = turn_of_launch(params, found.sends);
    if (lane == 0) peers->turn = turn;
    bool goes_on = true, has_settled = true;
    DEEPCOMM_NO_UNROLL
    for (int32_t item = lane; item < params.map.num_ranks * params.map.num_slots;
         item += device::kWarpSize) {
        if (item != lane) {
            if (item / params.map.num_ranks != turn.slot) continue;
            early.load(params, item);
            early.load_credit(params);
        }
        if (early.slot != turn.slot) continue;
        goes_on = open_peer<kHasNodes>(params, operation, turn, early, found.failed != 0, peers) &&
                  goes_on;
        has_settled = has_settled && is_settled(params, turn, early.received);
    }
    // ORDER: turn, peers and what credits have acquired, to all lanes
    if (device::Warp{}.sync_and(kHasNodes || has_settled)) return goes_on;
    return device::Warp{}.sync_and(goes_on) && settle_turn(params, operation, turn, peers);
}

/// Where late sources are masked, all blocks must agree on who takes part: the first to know says.
DEEPCOMM_DEVICE bool takes_part(const LowLatencyParams& params, const LowLatencyTurn& turn,
                                int32_t source, bool is_here) {
    uint64_t* decision = &params.decisions[turn.slot * params.map.num_ranks + source];
    const uint64_t mine = static_cast<uint64_t>(turn.tag) << 1 | (is_here ? 1u : 0u);
    const uint64_t before = device::ld_relaxed_gpu(decision);
    if (before >> 1 == turn.tag) return before & 1;
    const uint64_t found = device::atom_cas_relaxed_gpu(decision, before, mine);
    return found == before ? is_here : (found & 1) != 0;
}

}  // namespace deepcomm::kernels::low_latency
