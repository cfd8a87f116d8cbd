// SPDX-License-Identifier: Apache-2.0
// The header of a dispatch: one block tells every rank how many tokens come for each of its experts
// and which tokens they are; every block of a receiver reads the headers of all sources.
#pragma once

#include "kernels/low_latency/dispatch_count.cuh"
#include "kernels/low_latency/peers.cuh"

namespace deepcomm::kernels::low_latency {

// ---- sending

/// A word of the header for dst behind the first packet.
template <typename Shared>
DEEPCOMM_DEVICE uint32_t header_word(const LowLatencyDispatchParams& params, const Shared& shared,
                                     int32_t dst, int32_t word) {
    const layout::LowLatencyLayout& map = params.base.map;
    const int32_t expert = word - static_cast<int32_t>(layout::kHeaderWords);
    const int32_t bits = expert - map.num_local_experts;
    const uint32_t* value = bits < 0 ? &shared.counts[dst * map.num_local_experts + expert]
                                     : &shared.token_bits[dst * map.token_words + bits];
    return bits < map.token_words ? *value : 0;
}

/// A packet of it.
template <typename Shared>
DEEPCOMM_DEVICE Vec128 header_packet(const LowLatencyDispatchParams& params, const Shared& shared,
                                     int32_t dst, int32_t packet) {
    const uint32_t tag = shared.peers.turn.tag;
    // A masked rank, beyond one that is not: nothing comes there from here.
    const bool is_absent = Shared::kHasNodes && shared.peers.masked[dst] != 0;
    if (packet == 0) {
        const auto num_tokens = static_cast<uint32_t>(params.base.num_tokens);
        const uint32_t absence = refusal_flag(layout::RefusalKind::kAbsent);
        return {{params.base.signature, is_absent ? absence : num_tokens | shared.refusal, 0, tag}};
    }
    if (is_absent) return {{0, 0, 0, tag}};
    const int32_t word = packet * static_cast<int32_t>(layout::kPacketWords);
    return {{header_word(params, shared, dst, word), header_word(params, shared, dst, word + 1),
             header_word(params, shared, dst, word + 2), tag}};
}

/// Where the header for dst is stored.
struct HeaderPlace {
    int32_t rank;
    int64_t offset;
};

template <bool kHasNodes>
DEEPCOMM_DEVICE HeaderPlace header_place(const LowLatencyParams& params, const LowLatencyTurn& turn,
                                         int32_t dst) {
    const layout::LowLatencyLayout& map = params.map;
    const int32_t rank = next_rank_to<kHasNodes>(params, dst);
    if (rank == dst) return {rank, map.header_offset(turn.slot, params.comm.rank)};
    const int32_t local = dst % map.ranks_per_node;
    return {rank, map.rail_header_offset(turn.slot, params.node_idx, local)};
}

template <typename Shared>
DEEPCOMM_DEVICE void store_headers(const LowLatencyDispatchParams& params,
                                   const device::Block& block, const Shared& shared) {
    const layout::LowLatencyLayout& map = params.base.map;
    const LowLatencyTurn& turn = shared.peers.turn;
    DEEPCOMM_NO_UNROLL
    for (int32_t i = block.thread_idx(); i < map.num_ranks * map.header_packets;
         i += block.size()) {
        const int32_t dst = i / map.header_packets, packet = i % map.header_packets;
        const HeaderPlace place = header_place<Shared::kHasNodes>(params.base, turn, dst);
        if (shared.peers.masked[place.rank]) continue;
        device::st_relaxed_sys(packets_at(shared.peers.bases[place.rank], place.offset) + packet,
                               header_packet(params, shared, dst, packet));
    }
}

// ---- receiving

/// Waits for the first packet of each source, where one must know how long that takes or where a
/// late source is masked: the blocks then agree about who takes part. False: leave.
template <typename Shared>
DEEPCOMM_DEVICE bool await_sources(const LowLatencyParams& params, const device::Block& block,
                                   const LowLatencyTurn& turn, uint64_t start_ns, Shared& shared) {
    bool goes_on = true;
    DEEPCOMM_NO_UNROLL
    for (int32_t source = block.thread_idx(); source < params.map.num_ranks;
         source += block.size()) {
        const bool was_masked = shared.peers.masked[source] != 0;
        Arrival arrival = Arrival::kAbsent;
        int32_t late = source;
        if (!was_masked) {
            const int32_t peer = last_rank_from<Shared::kHasNodes>(params, source);
            const device::WaitSite site = {Operation::kLowLatencyDispatch, device::Role::kCount,
                                           peer, turn.slot};
            const int64_t offset = params.map.header_offset(turn.slot, source);
            Vec128 packet;
            arrival =
                wait_packet(params, site, packets_at(params.local, offset), turn.tag, &packet);
            add_wait(params, source, start_ns);
            if (arrival == Arrival::kAbsent) late = peer;
            if (Shared::kHasNodes && arrival == Arrival::kHere && tells_absence(packet)) {
                arrival = Arrival::kAbsent;
            }
        }
        goes_on = goes_on && arrival != Arrival::kFailed;
        if (!params.mask_late) continue;
        const bool is_present = takes_part(params, turn, source, arrival == Arrival::kHere);
        if (!is_present && !was_masked) mask_late_peer<Shared::kHasNodes>(params, turn, late);
        if constexpr (!Shared::kHasNodes) {
            // This block has not seen to its rows of the slot's last turn; those that know of it have.
            const device::WaitSite site = {Operation::kLowLatencyDispatch, device::Role::kCount,
                                           source, turn.slot};
            const bool is_back = is_present && was_masked;
            if (is_back && !await_cleared(params, site, last_of(params, turn))) goes_on = false;
        }
        shared.peers.masked[source] = is_present ? 0 : 1;
    }
    return block.sync_and(goes_on);  // ORDER: the decisions before the block acts on them
}

/// Puts the words of a packet of a source's header where they belong.
template <typename Shared>
DEEPCOMM_DEVICE void take_header_packet(const LowLatencyDispatchParams& params, Shared& shared,
                                        int32_t source, int32_t index, const Vec128& packet) {
    const layout::LowLatencyLayout& map = params.base.map;
    if (index == 0) {
        note_header(params.base, &shared.refusals, source, packet);
        shared.num_tokens[source] = static_cast<int32_t>(packet.words[1] & kTokenMask);
        return;
    }
    DEEPCOMM_UNROLL
    for (int32_t part = 0; part < layout::kPacketWords; ++part) {
        const int32_t word = index * static_cast<int32_t>(layout::kPacketWords) + part;
        const int32_t expert = word - static_cast<int32_t>(layout::kHeaderWords);
        const int32_t bits = expert - map.num_local_experts;
        uint32_t* value = bits < 0 ? &shared.counts[source * map.num_local_experts + expert]
                                   : &shared.token_bits[source * map.token_words + bits];
        if (bits < map.token_words) *value = packet.words[part];
    }
}

/// Reads the headers of all sources. False: leave.
template <typename Shared>
DEEPCOMM_DEVICE bool receive_headers(const LowLatencyDispatchParams& params,
                                     const device::Block& block, const LowLatencyTurn& turn,
                                     Shared& shared) {
    const LowLatencyParams& base = params.base;
    const uint64_t start_ns = start_of_waits(base, block);
    block.sync();  // ORDER: the peers are found, and what was sent from shared memory is read
    if constexpr (Shared::kHasNodes) {
        mask_cut_sources(base, block, &shared.peers);
        block.sync();  // ORDER: who is masked, to all
    }
    bool goes_on = true;
    if (start_ns != 0 || base.mask_late)
        goes_on = await_sources(base, block, turn, start_ns, shared);
    if (!goes_on) return false;
    const Divisor num_packets = base.map.header_packets;
    DEEPCOMM_NO_UNROLL
    for (int32_t i = block.thread_idx(); i < base.map.num_ranks * num_packets; i += block.size()) {
        const int32_t source = i / num_packets, index = i % num_packets;
        Vec128 packet = {{index == 0 ? base.signature : 0, 0, 0, 0}};  // masked: nothing comes
        if (!shared.peers.masked[source]) {
            const device::WaitSite site = {Operation::kLowLatencyDispatch, device::Role::kCount,
                                           last_rank_from<Shared::kHasNodes>(base, source),
                                           turn.slot};
            const int64_t offset = base.map.header_offset(turn.slot, source);
            const Vec128* address = packets_at(base.local, offset) + index;
            if (Shared::kHasNodes && index == 0) {
                goes_on = must_take_part(base, site, address, turn.tag, &packet) && goes_on;
            } else {
                goes_on = must_arrive(base, site, address, turn.tag, &packet) && goes_on;
            }
        }
        take_header_packet(params, shared, source, index, packet);
    }
    return block.sync_and(goes_on);  // ORDER: all words before they are used
}

}  // namespace deepcomm::kernels::low_latency
