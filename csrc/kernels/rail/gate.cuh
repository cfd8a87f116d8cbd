// SPDX-License-Identifier: Apache-2.0
// rail_gate: the kernel before the network on its stream. It waits until the rank's other kernels have
// written what is to be carried, and packs the words among it. PROTOCOLS.md: carried rails.
#pragma once

#include "kernels/meet/meet.cuh"
#include "kernels/rail/params.hpp"
#include "layout/plan.hpp"

namespace deepcomm::kernels {

constexpr int32_t kRailThreads = 256;
/// The deadline of whoever writes is the one to run out first: it knows more.
constexpr uint64_t kGatePatience = 4;
constexpr uint64_t kGateSliceNs = 20'000;
constexpr uint64_t kMostSliceNs = 1'000'000'000;

/// What the threads of the block share; they take peers, or words, in turn.
struct RailBlock {
    const RailParams& params;
    device::Block block;

    DEEPCOMM_DEVICE int32_t rank() const { return params.comm.rank; }
    DEEPCOMM_DEVICE layout::RailWords words() const { return {params.layout.shape.num_counters()}; }
    DEEPCOMM_DEVICE unsigned char* outbox(int32_t peer) const {
        return params.outbox + peer * words().num_bytes();
    }
    DEEPCOMM_DEVICE const unsigned char* inbox(int32_t peer) const {
        return params.inbox + peer * words().num_bytes();
    }
    template <typename T>
    DEEPCOMM_DEVICE T* word(int32_t at_rank, int64_t offset) const {
        return reinterpret_cast<T*>(params.comm.bases[at_rank] + offset);
    }
    DEEPCOMM_DEVICE device::WaitSite site(int32_t peer) const {
        const bool is_combine = params.step == RailStep::kPushed;
        return {is_combine ? device::Operation::kCombine : device::Operation::kDispatch,
                device::Role::kForward, peer};
    }
    /// Whether what is not there by now never will be: the stage that writes has come to its end, or
    /// the rank has failed.
    DEEPCOMM_DEVICE bool is_over() const {
        // ORDER: the words of an ended stage; pairs with end_stage
        const uint32_t done_epoch = device::ld_acquire_gpu(&params.verdict->done_epoch);
        if (device::is_reached(done_epoch, params.epoch) || has_failed(params.comm)) return true;
        const auto clear = static_cast<uint32_t>(layout::RecordState::kClear);
        return device::ld_relaxed_sys(&params.comm.record->state) != clear;
    }
    /// Waits until is_there() looks at the word at address and likes it. False where it never will.
    template <typename IsThere>
    DEEPCOMM_DEVICE bool await(int32_t peer, const void* address, IsThere&& is_there) const {
        // A wait knows one word; the other reason to end it is looked at between ever longer ones.
        const uint64_t patience_ns = kGatePatience * params.comm.timeout_ns;
        const uint64_t begin_ns = device::globaltimer_ns();
        uint64_t slice_ns = kGateSliceNs;
        while (device::globaltimer_ns() - begin_ns < patience_ns) {
            const device::WaitContext brief = {nullptr, slice_ns, params.comm.rank};
            const bool was_over = is_over();
            const bool has_come =
                device::wait_until(brief, site(peer), params.epoch, address,
                                   [&]() -> device::Observed { return {0, is_there()}; });
            if (has_come || was_over) return has_come;
            slice_ns = slice_ns < kMostSliceNs / 2 ? 2 * slice_ns : kMostSliceNs;
        }
        // It is this rank's own kernel that has not written.
        device::record_failure(wait_context(params.comm), site(rank()),
                               device::FailureKind::kTimeout, params.epoch, 0);
        return false;
    }
};

/// A word {value, epoch} of a mirror, to the outbox.
DEEPCOMM_DEVICE bool pack_word(const RailBlock& my, int32_t peer, int64_t from, int64_t to) {
    const auto* word = my.word<const uint64_t>(peer, from);
    uint64_t value = 0;
    const bool is_there = my.await(peer, word, [&]() {
        value = device::ld_relaxed_sys(word);
        return value >> 32 == my.params.epoch;
    });
    if (is_there) *reinterpret_cast<uint64_t*>(my.outbox(peer) + to) = value;
    return is_there;
}

DEEPCOMM_DEVICE bool pack_header(const RailBlock& my, int32_t peer) {
    const auto* packets =
        my.word<const device::Vec128>(peer, my.params.layout.header(my.params.epoch, my.rank()));
    auto* to = reinterpret_cast<device::Vec128*>(my.outbox(peer) + my.words().header());
    for (int32_t i = 0; i < 2; ++i) {
        device::Vec128 packet{};
        const bool is_there = my.await(peer, packets + i, [&]() {
            packet = device::ld_relaxed_sys(packets + i);
            return packet.words[3] == my.params.epoch;
        });
        if (!is_there) return false;
        to[i] = packet;
    }
    return true;
}

/// What this rank tells all ranks, itself included: a thread a rank, then a thread a count of each.
DEEPCOMM_DEVICE bool pack_meeting(const RailBlock& my) {
    const RailParams& params = my.params;
    bool is_there = true;
    for (int32_t peer = my.block.thread_idx(); peer < params.comm.num_ranks;
         peer += my.block.size()) {
        is_there = pack_header(my, peer) && is_there;
    }
    const int32_t num_counters = params.has_counts ? params.layout.shape.num_counters() : 0;
    for (int32_t i = my.block.thread_idx(); i < params.comm.num_ranks * num_counters;
         i += my.block.size()) {
        const int32_t peer = i / num_counters;
        const int64_t at = int64_t{8} * (i % num_counters);
        const int64_t from = params.layout.counts_of(params.epoch, my.rank()) + at;
        is_there = pack_word(my, peer, from, my.words().counts() + at) && is_there;
    }
    return is_there;
}

DEEPCOMM_DEVICE bool pack_lost(const RailBlock& my) {
    bool is_there = true;
    for (int32_t peer = my.block.thread_idx(); peer < my.params.comm.num_ranks;
         peer += my.block.size()) {
        if (peer == my.rank()) continue;
        const int64_t from = my.params.layout.lost_at(my.params.epoch, my.rank());
        is_there = pack_word(my, peer, from, my.words().lost()) && is_there;
    }
    return is_there;
}

/// Until all blocks have written their rows for every peer.
DEEPCOMM_DEVICE bool await_sent(const RailBlock& my) {
    const uint32_t expected = (my.params.state->num_arrivals + 1) * layout::kArrivals;
    bool is_there = true;
    for (int32_t peer = my.block.thread_idx(); peer < my.params.comm.num_ranks;
         peer += my.block.size()) {
        if (peer == my.rank()) continue;
        const auto* word = my.word<const uint32_t>(peer, my.params.layout.arrived_from(my.rank()));
        const bool has_arrived = my.await(peer, word, [&]() {
            return device::is_reached(device::ld_relaxed_sys(word), expected);
        });
        is_there = has_arrived && is_there;
    }
    return is_there;
}

/// The mirrors are complete where the routing was carried; where it was not, they never will be.
DEEPCOMM_DEVICE bool was_routed(const RailBlock& my) {
    return my.params.state->routed_epoch == my.params.epoch && !has_failed(my.params.comm);
}

/// Until the rows of the part have been pushed for every peer; a thread a chunk.
DEEPCOMM_DEVICE bool await_pushed(const RailBlock& my) {
    constexpr int32_t kChunk = layout::kPushChunk;
    const RailParams& params = my.params;
    const layout::PlanLayout words = {params.comm.num_ranks, 1};
    const int32_t* rows_from = params.plan + words.rows_from();
    const int32_t begin = params.begin_row / kChunk;
    const int32_t num_chunks = (params.end_row + kChunk - 1) / kChunk - begin;
    bool is_there = true;
    for (int32_t i = my.block.thread_idx(); i < params.comm.num_ranks * num_chunks;
         i += my.block.size()) {
        const int32_t peer = i / num_chunks, chunk = begin + i % num_chunks;
        const int32_t num_rows = rows_from[peer + 1] - rows_from[peer];
        if (peer == my.rank() || chunk * kChunk >= num_rows) continue;
        const auto* word =
            my.word<const uint32_t>(peer, params.layout.pushed_chunk(my.rank(), chunk));
        const bool has_come =
            my.await(peer, word, [&]() { return device::ld_relaxed_sys(word) == params.epoch; });
        is_there = has_come && is_there;
    }
    return is_there;
}

DEEPCOMM_DEVICE bool await_step(const RailBlock& my) {
    switch (my.params.step) {
        case RailStep::kMeeting: return pack_meeting(my);
        case RailStep::kRouting: return await_sent(my);
        case RailStep::kRows: return was_routed(my);
        case RailStep::kPushed: return await_pushed(my);
        case RailStep::kLost: return pack_lost(my);
    }
    return false;
}

extern "C" __global__ void __launch_bounds__(kRailThreads, 1)
    rail_gate(const __grid_constant__ RailParams params) {
    const RailBlock my = {params, {}};
    const bool is_there = await_step(my);
    // ORDER: acquires what the words stand for: releases of dispatch_send and combine, headers
    device::fence_acq_rel_sys();
    const bool is_ready = my.block.sync_and(is_there);
    const uint64_t tag = ready_tag(params.epoch, params.step, params.begin_row);
    for (int32_t peer = my.block.thread_idx(); peer < params.comm.num_ranks;
         peer += my.block.size()) {
        *reinterpret_cast<uint64_t*>(my.outbox(peer) + my.words().ready()) = is_ready ? tag : 0;
    }
    if (!my.block.is_leader()) return;
    params.state->is_ready = is_ready ? 1 : 0;
    if (is_ready && params.step == RailStep::kRouting) params.state->routed_epoch = params.epoch;
    device::st_relaxed_sys(&params.progress->num_gates, params.number);
}

}  // namespace deepcomm::kernels
