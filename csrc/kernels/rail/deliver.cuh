// SPDX-License-Identifier: Apache-2.0
// rail_deliver: the kernel behind the network on its stream. It writes to this rank's memory the words
// that a peer in reach would have written, once what they announce is there. PROTOCOLS.md: carried rails.
#pragma once

#include "kernels/rail/gate.cuh"

namespace deepcomm::kernels {

/// What a peer's header says of this operation; nothing if it is of another.
struct PeerHeader {
    device::Vec128 packets[2];
    bool is_here;

    DEEPCOMM_DEVICE Header get() const { return header_of(packets[0], packets[1]); }
};

/// As it came, or as this rank has told the peers.
DEEPCOMM_DEVICE PeerHeader header_from(const RailBlock& my, int32_t peer) {
    const unsigned char* words = peer == my.rank() ? my.outbox(peer) : my.inbox(peer);
    const auto* packets = reinterpret_cast<const device::Vec128*>(words + my.words().header());
    const device::Vec128 first = packets[0], second = packets[1];
    return {{first, second},
            first.words[3] == my.params.epoch && second.words[3] == my.params.epoch};
}

DEEPCOMM_DEVICE uint64_t counted_by(const RailBlock& my, int32_t src, int32_t counter) {
    const unsigned char* words = src == my.rank() ? my.outbox(src) : my.inbox(src);
    return reinterpret_cast<const uint64_t*>(words + my.words().counts())[counter];
}

/// By all threads; words of another epoch are of an operation that the peer was not in.
DEEPCOMM_DEVICE void deliver_meeting(const RailBlock& my) {
    const RailParams& params = my.params;
    const int32_t num_counters = params.layout.shape.num_counters();
    for (int32_t i = my.block.thread_idx(); i < params.comm.num_ranks * num_counters;
         i += my.block.size()) {
        const int32_t src = i / num_counters;
        const uint64_t value = counted_by(my, src, i % num_counters);
        if (src == my.rank() || value >> 32 != params.epoch) continue;
        const int64_t at = params.layout.counts_of(params.epoch, src) + 8 * (i % num_counters);
        device::st_relaxed_sys(my.word<uint64_t>(my.rank(), at), value);
    }
    for (int32_t src = my.block.thread_idx(); src < params.comm.num_ranks; src += my.block.size()) {
        const PeerHeader theirs = header_from(my, src);
        if (src == my.rank() || !theirs.is_here) continue;
        auto* to = my.word<device::Vec128>(my.rank(), params.layout.header(params.epoch, src));
        device::st_relaxed_sys(to, theirs.packets[0]);
        device::st_relaxed_sys(to + 1, theirs.packets[1]);
    }
}

/// Whether the meeting's verdict is good: nobody refuses, differs, or brings too many tokens.
DEEPCOMM_DEVICE bool is_good_meeting(const RailBlock& my) {
    const Header mine = header_from(my, my.rank()).get();
    for (int32_t src = 0; src < my.params.comm.num_ranks; ++src) {
        const PeerHeader heard = header_from(my, src);
        const Header theirs = heard.get();
        if (!heard.is_here || theirs.refusal != 0 || theirs.num_tokens > my.params.max_tokens ||
            theirs.signature != mine.signature || theirs.alignment != mine.alignment) {
            return false;
        }
    }
    return true;
}

/// By one thread: how many rows the network will have to carry.
DEEPCOMM_DEVICE void report_meeting(const RailBlock& my) {
    const RailParams& params = my.params;
    const layout::RailReport words = {params.comm.num_ranks};
    const auto at = [&](int64_t offset) {
        return reinterpret_cast<int32_t*>(params.report + offset);
    };
    const int32_t my_rank = my.rank();
    for (int32_t peer = 0; peer < params.comm.num_ranks; ++peer) {
        at(words.rows_to())[peer] = static_cast<int32_t>(counted_by(my, my_rank, peer));
        at(words.rows_from())[peer] = static_cast<int32_t>(counted_by(my, peer, my_rank));
        const Header theirs = header_from(my, peer).get();
        at(words.ids_are_64())[peer] = (theirs.landing & kLandingIdsAre64) != 0;
    }
    *at(words.is_good()) = is_good_meeting(my) ? 1 : 0;
    // ORDER: the report's fields; pairs with the host's acquire of the tag
    device::st_release_sys(reinterpret_cast<uint64_t*>(params.report),
                           static_cast<uint64_t>(params.epoch));
}

/// Whether a peer had something to carry in this step, too.
DEEPCOMM_DEVICE bool was_ready(const RailBlock& my, int32_t src) {
    const RailParams& params = my.params;
    const auto told = *reinterpret_cast<const uint64_t*>(my.inbox(src) + my.words().ready());
    return told == ready_tag(params.epoch, params.step, params.begin_row);
}

/// All but the rows of every peer is here; the fence of the kernel stands before what says so.
DEEPCOMM_DEVICE void deliver_routing(const RailBlock& my) {
    for (int32_t src = my.block.thread_idx(); src < my.params.comm.num_ranks;
         src += my.block.size()) {
        if (src == my.rank() || !was_ready(my, src)) continue;
        auto* word = my.word<uint32_t>(my.rank(), my.params.layout.arrived_from(src));
        device::red_add_relaxed_sys(word, layout::kArrivals);
    }
    if (my.block.is_leader()) my.params.state->num_arrivals += 1;
}

/// Rows up to the end of the part are here, for who sends them on.
DEEPCOMM_DEVICE void deliver_rows(const RailBlock& my) {
    const RailParams& params = my.params;
    const uint64_t word =
        static_cast<uint64_t>(params.epoch) << 32 | static_cast<uint32_t>(params.end_row);
    for (int32_t src = my.block.thread_idx(); src < params.comm.num_ranks; src += my.block.size()) {
        if (src == my.rank() || !was_ready(my, src)) continue;
        device::st_relaxed_gpu(params.landed + src, word);
    }
}

/// A part of the rows that come back is here; chunks beyond the last row say nothing to anybody.
DEEPCOMM_DEVICE void deliver_pushed(const RailBlock& my) {
    constexpr int32_t kChunk = layout::kPushChunk;
    const RailParams& params = my.params;
    const int32_t begin = params.begin_row / kChunk;
    const int32_t num_chunks = (params.end_row + kChunk - 1) / kChunk - begin;
    for (int32_t i = my.block.thread_idx(); i < params.comm.num_ranks * num_chunks;
         i += my.block.size()) {
        const int32_t src = i / num_chunks, chunk = begin + i % num_chunks;
        if (src == my.rank() || !was_ready(my, src)) continue;
        auto* word = my.word<uint32_t>(my.rank(), params.layout.pushed_chunk(src, chunk));
        device::st_relaxed_sys(word, params.epoch);
    }
}

DEEPCOMM_DEVICE void deliver_lost(const RailBlock& my) {
    for (int32_t src = my.block.thread_idx(); src < my.params.comm.num_ranks;
         src += my.block.size()) {
        const auto value = *reinterpret_cast<const uint64_t*>(my.inbox(src) + my.words().lost());
        if (src == my.rank() || value >> 32 != my.params.epoch) continue;
        const int64_t at = my.params.layout.lost_at(my.params.epoch, src);
        device::st_relaxed_sys(my.word<uint64_t>(my.rank(), at), value);
    }
}

extern "C" __global__ void __launch_bounds__(kRailThreads, 1)
    rail_deliver(const __grid_constant__ RailParams params) {
    const RailBlock my = {params, {}};
    const bool is_ready = params.state->is_ready != 0;
    device::fence_acq_rel_sys();  // ORDER: what the network has brought, before words that say so
    if (has_failed(params.comm)) {
        // A move that has failed is not over: peers may still be writing to the inbox.
    } else if (params.step == RailStep::kMeeting) {
        deliver_meeting(my);
        if (my.block.is_leader() && params.has_counts) report_meeting(my);
    } else if (params.step == RailStep::kLost) {
        deliver_lost(my);
    } else if (is_ready) {
        if (params.step == RailStep::kRouting) deliver_routing(my);
        if (params.step == RailStep::kRows) deliver_rows(my);
        if (params.step == RailStep::kPushed) deliver_pushed(my);
    }
    if (!my.block.is_leader()) return;
    device::st_relaxed_sys(&params.progress->num_deliveries, params.number);
}

}  // namespace deepcomm::kernels
