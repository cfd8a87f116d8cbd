// SPDX-License-Identifier: Apache-2.0
// dispatch_count: counts this rank's routing, exchanges the counts, and gives every row its slot.
// Blocks own consecutive tokens, and so do the warps of a block. PROTOCOLS.md: dispatch_count.
#pragma once

#include "kernels/dispatch/assign.cuh"
#include "kernels/dispatch/count_exchange.cuh"

namespace deepcomm::kernels {

/// Counts the block's pairs; the counters of each warp hold its own.
template <int32_t kNumRanks, int32_t kNumExperts, int32_t kNumOrigins>
DEEPCOMM_DEVICE void count_pairs(const CountBlock<kNumRanks, kNumExperts, kNumOrigins>& my) {
    const device::Warp warp;
    if (my.walks()) {
        DEEPCOMM_NO_UNROLL
        for (int32_t i = warp.thread_idx(); i < my.kNumCounters; i += warp.size()) {
            my.counters()[i] = 0;
        }
    }
    if (my.block.is_leader()) my.smem.refusal = 0;
    if (kNumOrigins > 1) {
        DEEPCOMM_NO_UNROLL
        for (int32_t o = my.block.thread_idx(); o <= kNumOrigins; o += my.block.size()) {
            my.smem.tokens_from[o] = has_input(my.params.meet) ? my.params.tokens_from[o] : 0;
        }
    }
    my.block.sync();  // ORDER: the zeros and origins before anybody counts
    uint32_t refusal = 0;
    if (my.walks()) {
        const Walk walk = my.walk(warp.warp_idx());
        DEEPCOMM_NO_UNROLL
        for (int32_t first = walk.begin; first < walk.end; first += warp.size()) {
            const WalkedToken walked = walk.mark(first, my.masks(), my.kNumCounters);
            refusal |= walked.refusal;
            my.smem.firsts[warp.warp_idx()][warp.thread_idx()] = walked.firsts;
            add_marks(my.masks(), my.counters(), my.kNumCounters);
        }
    }
    if (refusal != 0) device::atom_or_relaxed_block(&my.smem.refusal, refusal);
    my.block.sync();  // ORDER: the counts of all warps before they are added up
}

/// Tokens of the block (origin, source) that go to a rank.
template <int32_t kNumRanks, int32_t kNumExperts, int32_t kNumOrigins>
DEEPCOMM_DEVICE uint32_t known_tokens(const CountBlock<kNumRanks, kNumExperts, kNumOrigins>& my,
                                      int32_t origin, int32_t src, int32_t dst) {
    return my.smem.tokens[(origin * kNumRanks + src) * kNumRanks + dst];
}

/// Rows of src that come back from dst, of origins before one.
template <int32_t kNumRanks, int32_t kNumExperts, int32_t kNumOrigins>
DEEPCOMM_DEVICE uint32_t rows_back(const CountBlock<kNumRanks, kNumExperts, kNumOrigins>& my,
                                   int32_t src, int32_t dst, int32_t end_origin) {
    uint32_t rows = 0;
    DEEPCOMM_NO_UNROLL
    for (int32_t origin = 0; origin < end_origin; ++origin) {
        rows += known_tokens(my, origin, src, dst);
    }
    return rows;
}

/// Where what comes back to src from dst begins in its combine region: after lower ranks' rows.
template <int32_t kNumRanks, int32_t kNumExperts, int32_t kNumOrigins>
DEEPCOMM_DEVICE uint32_t region_begin(const CountBlock<kNumRanks, kNumExperts, kNumOrigins>& my,
                                      int32_t src, int32_t dst) {
    uint32_t rows = 0;
    DEEPCOMM_NO_UNROLL
    for (int32_t other = 0; other < dst; ++other) {
        if (other != src) rows += rows_back(my, src, other, kNumOrigins);
    }
    return rows;
}

/// By the first block: what the handle keeps (layout/plan.hpp).
template <int32_t kNumRanks, int32_t kNumExperts, int32_t kNumOrigins>
DEEPCOMM_DEVICE void write_plan(const CountBlock<kNumRanks, kNumExperts, kNumOrigins>& my) {
    constexpr layout::PlanLayout kWords = {kNumRanks, kNumOrigins};
    const int32_t rank = my.params.meet.comm.rank;
    const auto put = [&](int32_t word, uint32_t value) {
        *my.plan(word) = static_cast<int32_t>(value);
    };
    DEEPCOMM_NO_UNROLL
    for (int32_t b = my.block.thread_idx(); b < kWords.num_blocks(); b += my.block.size()) {
        const int32_t origin = b / kNumRanks, peer = b % kNumRanks;
        uint32_t rows_before = 0, sent_base = 0;
        DEEPCOMM_NO_UNROLL
        for (int32_t other = 0; other < origin * kNumRanks + rank || other < b; ++other) {
            const int32_t o = other / kNumRanks, src = other % kNumRanks;
            if (other < b) rows_before += known_tokens(my, o, src, rank);
            if (other < origin * kNumRanks + rank) sent_base += known_tokens(my, o, src, peer);
        }
        // A mirror has room for this rank's rows alone, and the network finds their place.
        const bool is_mirror = my.is_mirror(peer);
        put(kWords.rows_from() + b, rows_before);
        put(kWords.sent_base() + b, is_mirror ? 0 : sent_base);
        put(kWords.push_base() + b,
            is_mirror ? 0 : region_begin(my, peer, rank) + rows_back(my, peer, rank, origin));
        put(kWords.combine_base() + b,
            region_begin(my, rank, peer) + rows_back(my, rank, peer, origin));
        if (origin == 0) {
            put(kWords.capacity() + peer,
                static_cast<uint32_t>(limit_of(my.smem.meet.headers[peer])));
        }
    }
    DEEPCOMM_NO_UNROLL
    for (int32_t o = my.block.thread_idx(); o <= kNumOrigins; o += my.block.size()) {
        const int32_t first = kNumOrigins == 1 ? o * my.params.num_tokens : my.smem.tokens_from[o];
        *my.plan(kWords.tokens_from() + o) = first;
    }
    if (!my.block.is_leader()) return;
    put(kWords.rows_from() + kWords.num_blocks(), my.smem.totals[rank]);
    put(kWords.made(), 1);
}

/// Rows of this rank's receive tensor that are in use, before any capacity.
template <int32_t kNumRanks, int32_t kNumExperts, int32_t kNumOrigins>
DEEPCOMM_DEVICE int32_t slots_here(const CountBlock<kNumRanks, kNumExperts, kNumOrigins>& my) {
    const int32_t rank = my.params.meet.comm.rank;
    return my.params.recv_layout == RecvLayout::kToken ? static_cast<int32_t>(my.smem.totals[rank])
                                                       : my.smem.num_slots[rank];
}

/// By the first block: counts, offsets and flags of this rank.
template <int32_t kNumRanks, int32_t kNumExperts, int32_t kNumOrigins>
DEEPCOMM_DEVICE void write_outputs(const CountBlock<kNumRanks, kNumExperts, kNumOrigins>& my) {
    const int32_t rank = my.params.meet.comm.rank;
    const int32_t limit = limit_of(my.smem.meet.headers[rank]);
    const int32_t num_slots = slots_here(my);
    const bool is_token = my.params.recv_layout == RecvLayout::kToken;
    DEEPCOMM_NO_UNROLL
    for (int32_t local = my.block.thread_idx(); local < my.kNumLocal; local += my.block.size()) {
        const int32_t expert = rank * my.kNumLocal + local;
        auto count = static_cast<int32_t>(my.smem.totals[kNumRanks + expert]);
        const int32_t offset = my.smem.offsets[expert];
        const int32_t room = offset < limit ? limit - offset : 0;
        if (!is_token && count > room) {  // not if only padding is beyond the limit
            count = room;
            device::atom_or_relaxed_gpu(my.params.overflow, 1u);
        }
        my.params.counts[local] = count;
        if (my.params.recv_layout == RecvLayout::kExpert) {
            my.params.offsets[local] = offset < limit ? offset : limit;
        }
    }
    if (!my.block.is_leader()) return;
    if (my.params.recv_layout == RecvLayout::kExpert) {
        my.params.offsets[my.kNumLocal] = num_slots < limit ? num_slots : limit;
    }
    int32_t num_recv = num_slots < limit ? num_slots : limit;
    if (my.params.recv_layout == RecvLayout::kExpertPadded) {
        num_recv = 0;
        DEEPCOMM_NO_UNROLL
        for (int32_t local = 0; local < my.kNumLocal; ++local) {
            num_recv +=
                static_cast<int32_t>(my.smem.totals[kNumRanks + rank * my.kNumLocal + local]);
        }
    }
    *my.params.num_recv = num_recv;
    if (is_token && num_slots > limit) device::atom_or_relaxed_gpu(my.params.overflow, 1u);
    my.params.report->num_rows = num_slots;
    my.params.report->num_recv = num_recv;
    my.params.report->num_tokens = static_cast<int32_t>(my.smem.totals[rank]);
}

/// By one thread of the first block: wakes a host that waits for the counts.
DEEPCOMM_DEVICE void send_report(const CountParams& params, MeetStatus status) {
    params.report->status = static_cast<int32_t>(status);
    // ORDER: the report's fields; pairs with the host's acquire of the tag
    device::st_release_sys(&params.report->tag, params.report_tag);
}

/// The rest of the operation once all headers are there.
template <int32_t kNumRanks, int32_t kNumExperts, int32_t kNumOrigins>
DEEPCOMM_DEVICE bool settle_counts(const CountBlock<kNumRanks, kNumExperts, kNumOrigins>& my) {
    const bool is_first_block = my.block.block_idx() == 0;
    const MeetStatus status = my.smem.meet.status;
    if (status != MeetStatus::kGood) {
        if (!is_first_block || !my.block.is_leader()) return true;
        record_verdict(my.params.meet, my.smem.meet, my.epoch);
        report_trouble(my.params.meet);
        end_stage(my.params.meet, my.epoch);  // nothing else will take place
        send_report(my.params, status);
        return true;
    }
    if (!gather_counts(my)) return false;
    place_groups(my);
    if (is_first_block) {
        write_outputs(my);
        write_plan(my);
    }
    start_slots(my);
    // By a warp that does not walk: to release what the host reads takes as long as the walk.
    if (is_first_block && my.block.thread_idx() == my.block.size() - 1) {
        record_verdict(my.params.meet, my.smem.meet, my.epoch);
        send_report(my.params, status);
    }
    assign_slots(my);
    return true;
}

template <int32_t kNumRanks, int32_t kNumExperts, int32_t kNumOrigins>
__global__ void __launch_bounds__(kCountWarps * 32, 1)
    dispatch_count(const __grid_constant__ CountParams params) {
    constexpr layout::PlanLayout kWords = {kNumRanks, kNumOrigins};
    const device::Block block;
    auto* state = static_cast<device::EpochState*>(params.meet.epoch);
    if (block.block_idx() == 0 && block.is_leader()) {  // until this kernel has ended well
        params.meet.verdict->met_epoch = kNotMet;
        if (params.table.plan != nullptr) params.table.plan[kWords.made()] = 0;
    }
    const uint32_t epoch = device::current_epoch(state);
    if (!may_begin(params.meet, block, device::Operation::kDispatch, epoch)) return;
    const CountBlock<kNumRanks, kNumExperts, kNumOrigins> my = {
        params, device::shared_storage<CountShared<kNumRanks, kNumExperts, kNumOrigins>>(), block,
        epoch};
    count_pairs(my);
    if (!exchange_partials(my)) return;
    if (my.block.block_idx() == my.block.num_blocks() - 1) publish_counts(my);
    if (!await_headers(params.meet, my.block, device::Operation::kDispatch, my.epoch,
                       &my.smem.meet)) {
        return;
    }
    if (!settle_counts(my)) return;
    my.block.sync();  // ORDER: every thread has read the epoch
    if (my.block.is_leader()) device::finish_epoch(state, my.block.num_blocks());
}

}  // namespace deepcomm::kernels
