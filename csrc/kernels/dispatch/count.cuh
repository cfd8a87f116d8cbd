// SPDX-License-Identifier: Apache-2.0
// dispatch_count: counts this rank's routing, exchanges the counts, and gives every row its slot.
// Blocks own consecutive tokens, and so do the warps of a block. PROTOCOLS.md: dispatch_count.
#pragma once

#include "kernels/dispatch/walk.cuh"
#include "kernels/meet/meet.cuh"
#include "layout/plan.hpp"

namespace deepcomm::kernels {

constexpr int32_t kCountWarps = 8;
constexpr int32_t kNoLimit = 0x7FFFFFFF;

template <int32_t kNumRanks, int32_t kNumExperts>
struct CountShared {
    static constexpr int32_t kNumCounters = kNumRanks + kNumExperts;

    MeetTable<kNumRanks> meet;
    /// [R] tokens for each rank, then [E] pairs for each expert: of each warp; later the next slot.
    uint32_t counters[kCountWarps][kNumCounters];
    uint32_t before[kNumCounters];  ///< of blocks, then also of ranks, that come first
    uint32_t totals[kNumCounters];  ///< of all ranks
    int32_t offsets[kNumExperts];   ///< first row of each expert at its rank
    int32_t num_slots[kNumRanks];   ///< rows of an expert layout at each rank
    uint32_t refusal;
};

/// Everything that the steps of one block share.
template <int32_t kNumRanks, int32_t kNumExperts>
struct CountBlock {
    static constexpr int32_t kNumLocal = kNumExperts / kNumRanks;
    static constexpr int32_t kNumCounters = kNumRanks + kNumExperts;
    static constexpr int32_t kNumPartials = kNumCounters + 1;  ///< and the refusal

    const CountParams& params;
    CountShared<kNumRanks, kNumExperts>& smem;
    device::Block block;
    uint32_t epoch;

    DEEPCOMM_DEVICE Walk walk(int32_t warp_idx) const {
        const auto num_tokens = static_cast<int64_t>(params.num_tokens);
        const int32_t num_parts = block.num_blocks() * kCountWarps;
        const int32_t part = block.block_idx() * kCountWarps + warp_idx;
        return {params.topk_idx,
                params.ids_are_64,
                params.num_topk,
                kNumExperts,
                kNumLocal,
                static_cast<int32_t>(num_tokens * part / num_parts),
                static_cast<int32_t>(num_tokens * (part + 1) / num_parts)};
    }

    DEEPCOMM_DEVICE device::WaitSite site(device::Role role, int32_t peer) const {
        return {device::Operation::kDispatch, role, peer};
    }

    DEEPCOMM_DEVICE uint64_t* partial(int32_t block_idx, int32_t counter) const {
        return params.partials + static_cast<int64_t>(block_idx) * kNumPartials + counter;
    }
    DEEPCOMM_DEVICE uint64_t tagged(uint32_t value) const {
        return static_cast<uint64_t>(epoch) << 32 | value;
    }
    DEEPCOMM_DEVICE int32_t* plan(int32_t word) const { return params.table.plan + word; }
};

/// Counts the block's pairs; the counters of each warp hold its own.
template <int32_t kNumRanks, int32_t kNumExperts>
DEEPCOMM_DEVICE void count_pairs(const CountBlock<kNumRanks, kNumExperts>& my) {
    const device::Warp warp;
    uint32_t* counters = my.smem.counters[warp.warp_idx()];
    for (int32_t i = warp.thread_idx(); i < my.kNumCounters; i += warp.size()) counters[i] = 0;
    if (my.block.is_leader()) my.smem.refusal = 0;
    my.block.sync();  // ORDER: the zeros before anybody counts
    const Walk walk = my.walk(warp.warp_idx());
    uint32_t refusal = 0;
    for (int32_t token = walk.begin; token < walk.end; token += walk.tokens_per_step()) {
        const Pair pair = walk.at(token);
        add_to_counters(pair, kNumRanks, counters);
        refusal |= pair.refusal;
        if (pair.index >= 0) my.params.table.topk_idx[pair.index] = pair.expert;
    }
    if (refusal != 0) device::atom_or_relaxed_block(&my.smem.refusal, refusal);
    my.block.sync();  // ORDER: the counts of all warps before they are added up
}

/// Publishes the block's sums to the blocks after it and learns those of the blocks before it;
/// the last block then knows the rank's sums and publishes them to all ranks, header first.
template <int32_t kNumRanks, int32_t kNumExperts>
DEEPCOMM_DEVICE bool exchange_counts(const CountBlock<kNumRanks, kNumExperts>& my) {
    const bool is_last = my.block.block_idx() == my.block.num_blocks() - 1;
    const CommParams& comm = my.params.meet.comm;
    const auto context = wait_context(comm);
    bool is_complete = true;
    uint32_t refusal = 0;
    for (int32_t i = my.block.thread_idx(); i < my.kNumPartials; i += my.block.size()) {
        uint32_t own = 0, before = 0;
        if (i == my.kNumCounters) {
            own = device::ld_relaxed_block(&my.smem.refusal);
        } else {
            for (int32_t w = 0; w < kCountWarps; ++w) own += my.smem.counters[w][i];
        }
        device::st_relaxed_gpu(my.partial(my.block.block_idx(), i), my.tagged(own));
        for (int32_t other = 0; other < my.block.block_idx() && is_complete; ++other) {
            const uint64_t* word = my.partial(other, i);
            uint64_t value = 0;
            is_complete = device::wait_until(
                context, my.site(device::Role::kCount, comm.rank), my.epoch, word,
                [&]() -> device::Observed {
                    value = device::ld_relaxed_gpu(word);
                    return {value >> 32, value >> 32 == my.epoch};
                });
            before = i == my.kNumCounters ? before | static_cast<uint32_t>(value)
                                          : before + static_cast<uint32_t>(value);
        }
        if (i == my.kNumCounters) {
            refusal = before | own;
            continue;
        }
        my.smem.before[i] = before;
        my.smem.totals[i] = before + own;
    }
    if (my.kNumCounters % my.block.size() == my.block.thread_idx()) my.smem.refusal = refusal;
    if (!my.block.sync_and(is_complete)) return false;  // ORDER: the sums before their publication
    if (!is_last) return true;
    publish_header(my.params.meet, my.block, my.epoch, my.smem.refusal);
    for (int32_t peer = 0; peer < kNumRanks; ++peer) {
        auto* words = reinterpret_cast<uint64_t*>(
            comm.bases[peer] + my.params.meet.layout.counts_of(my.epoch, comm.rank));
        for (int32_t i = my.block.thread_idx(); i < my.kNumCounters; i += my.block.size()) {
            device::st_relaxed_sys(words + i, my.tagged(my.smem.totals[i]));
        }
    }
    my.block.sync();  // ORDER: the sums are read before gather_counts replaces them
    return true;
}

/// The count that a rank has sent, once it is there.
template <int32_t kNumRanks, int32_t kNumExperts>
DEEPCOMM_DEVICE bool await_count(const CountBlock<kNumRanks, kNumExperts>& my, int32_t src,
                                 int32_t counter, uint32_t* count) {
    const CommParams& comm = my.params.meet.comm;
    const auto* word = reinterpret_cast<const uint64_t*>(
                           comm.bases[comm.rank] + my.params.meet.layout.counts_of(my.epoch, src)) +
                       counter;
    uint64_t value = 0;
    const bool is_there = device::wait_until(
        wait_context(comm), my.site(device::Role::kCount, src), my.epoch, word,
        [&]() -> device::Observed {
            value = device::ld_relaxed_sys(word);
            return {value >> 32, value >> 32 == my.epoch};
        });
    *count = static_cast<uint32_t>(value);
    return is_there;
}

/// Adds up all ranks' counts: totals, and what comes before this block's own.
template <int32_t kNumRanks, int32_t kNumExperts>
DEEPCOMM_DEVICE bool gather_counts(const CountBlock<kNumRanks, kNumExperts>& my) {
    const int32_t rank = my.params.meet.comm.rank;
    bool is_complete = true;
    for (int32_t i = my.block.thread_idx(); i < my.kNumCounters; i += my.block.size()) {
        uint32_t total = 0, before = my.smem.before[i];
        for (int32_t src = 0; src < kNumRanks && is_complete; ++src) {
            uint32_t count = 0;
            is_complete = await_count(my, src, i, &count);
            if (src < rank) before += count;
            total += count;
        }
        my.smem.before[i] = before;
        my.smem.totals[i] = total;
    }
    return my.block.sync_and(is_complete);  // ORDER: the sums before the offsets made of them
}

/// A warp a rank: where the groups of its experts begin.
template <int32_t kNumRanks, int32_t kNumExperts>
DEEPCOMM_DEVICE void place_groups(const CountBlock<kNumRanks, kNumExperts>& my) {
    const device::Warp warp;
    const int32_t lane = warp.thread_idx();
    const bool is_padded = my.params.recv_layout == RecvLayout::kExpertPadded;
    const auto alignment = static_cast<uint32_t>(my.params.meet.header.alignment);
    const int32_t block_rows = kNumRanks * my.params.meet.max_tokens;
    for (int32_t rank = warp.warp_idx(); rank < kNumRanks; rank += kCountWarps) {
        int32_t begin = 0;
        for (int32_t first = 0; first < my.kNumLocal; first += device::kWarpSize) {
            const int32_t local = first + lane;
            const int32_t expert = rank * my.kNumLocal + local;
            uint32_t rows = local < my.kNumLocal ? my.smem.totals[kNumRanks + expert] : 0;
            rows = (rows + alignment - 1) / alignment * alignment;
            auto end = static_cast<int32_t>(rows);
            for (int32_t distance = 1; distance < device::kWarpSize; distance *= 2) {
                const int32_t other = device::warp_shuffle_up(end, distance);
                if (lane >= distance) end += other;
            }
            if (local < my.kNumLocal) {
                my.smem.offsets[expert] =
                    is_padded ? local * block_rows : begin + end - static_cast<int32_t>(rows);
            }
            begin += device::warp_shuffle(end, device::kWarpSize - 1);
        }
        if (lane == 0) my.smem.num_slots[rank] = is_padded ? my.kNumLocal * block_rows : begin;
    }
    my.block.sync();  // ORDER: the offsets before they are read
}

/// Turns the warps' counters into the next slot of each.
template <int32_t kNumRanks, int32_t kNumExperts>
DEEPCOMM_DEVICE void start_slots(const CountBlock<kNumRanks, kNumExperts>& my) {
    for (int32_t i = my.block.thread_idx(); i < my.kNumCounters; i += my.block.size()) {
        uint32_t next = my.smem.before[i];
        if (i >= kNumRanks) next += static_cast<uint32_t>(my.smem.offsets[i - kNumRanks]);
        for (int32_t w = 0; w < kCountWarps; ++w) {
            const uint32_t count = my.smem.counters[w][i];
            my.smem.counters[w][i] = next;
            next += count;
        }
    }
    my.block.sync();  // ORDER: the first slots before the warps' walks
}

DEEPCOMM_DEVICE int32_t limit_of(const Header& header) {
    return header.capacity == kNoCapacity ? kNoLimit : header.capacity;
}

/// Walks again and writes every pair's slot.
template <int32_t kNumRanks, int32_t kNumExperts>
DEEPCOMM_DEVICE void assign_slots(const CountBlock<kNumRanks, kNumExperts>& my) {
    const device::Warp warp;
    uint32_t* counters = my.smem.counters[warp.warp_idx()];
    const RoutingTable& table = my.params.table;
    const bool by_expert = my.params.recv_layout != RecvLayout::kToken;
    const Walk walk = my.walk(warp.warp_idx());
    bool has_lost = false;
    for (int32_t token = walk.begin; token < walk.end; token += walk.tokens_per_step()) {
        const Pair pair = walk.at(token);
        int32_t token_slot = -1, pair_slot = -1;
        if (pair.is_first) {
            token_slot = static_cast<int32_t>(counters[pair.dst]) + num_before(pair.firsts);
        }
        if (pair.expert >= 0) {
            pair_slot = static_cast<int32_t>(counters[kNumRanks + pair.expert]) +
                        num_before(pair.same_expert);
            const int32_t slot = by_expert ? pair_slot : token_slot;
            has_lost = has_lost || slot >= limit_of(my.smem.meet.headers[pair.dst]);
        }
        if (pair.index >= 0) {
            table.token_slot[pair.index] = token_slot;
            if (by_expert) table.pair_slot[pair.index] = pair_slot;
        }
        warp.sync();  // ORDER: the counters are read before they move on
        add_to_counters(pair, kNumRanks, counters);
    }
    if (has_lost) device::atom_or_relaxed_gpu(my.params.overflow, 1u);
}

/// By the first block: what the handle keeps (layout/plan.hpp).
template <int32_t kNumRanks, int32_t kNumExperts>
DEEPCOMM_DEVICE void write_plan(const CountBlock<kNumRanks, kNumExperts>& my) {
    const layout::PlanLayout words = {kNumRanks};
    const int32_t rank = my.params.meet.comm.rank;
    for (int32_t peer = my.block.thread_idx(); peer < kNumRanks; peer += my.block.size()) {
        uint32_t push_base = 0, sent_base = 0, combine_base = 0, rows_before = 0, count = 0;
        for (int32_t other = 0; other < kNumRanks; ++other) {
            // Arrived already: gather_counts has waited for all of them.
            if (other < rank && other != peer) {
                (void)await_count(my, peer, other, &count);
                push_base += count;
            }
            if (other < rank) {
                (void)await_count(my, other, peer, &count);
                sent_base += count;
            }
            if (other < peer && other != rank) {
                (void)await_count(my, rank, other, &count);
                combine_base += count;
            }
            if (other < peer) {
                (void)await_count(my, other, rank, &count);
                rows_before += count;
            }
        }
        *my.plan(words.rows_from() + peer) = static_cast<int32_t>(rows_before);
        *my.plan(words.push_base() + peer) = static_cast<int32_t>(push_base);
        *my.plan(words.sent_base() + peer) = static_cast<int32_t>(sent_base);
        *my.plan(words.combine_base() + peer) = static_cast<int32_t>(combine_base);
        *my.plan(words.capacity() + peer) = limit_of(my.smem.meet.headers[peer]);
    }
    if (my.block.is_leader()) {
        *my.plan(words.rows_from() + kNumRanks) = static_cast<int32_t>(my.smem.totals[rank]);
    }
}

/// Rows of this rank's receive tensor that are in use, before any capacity.
template <int32_t kNumRanks, int32_t kNumExperts>
DEEPCOMM_DEVICE int32_t slots_here(const CountBlock<kNumRanks, kNumExperts>& my) {
    const int32_t rank = my.params.meet.comm.rank;
    return my.params.recv_layout == RecvLayout::kToken ? static_cast<int32_t>(my.smem.totals[rank])
                                                       : my.smem.num_slots[rank];
}

/// By the first block: counts, offsets and flags of this rank.
template <int32_t kNumRanks, int32_t kNumExperts>
DEEPCOMM_DEVICE void write_outputs(const CountBlock<kNumRanks, kNumExperts>& my) {
    const int32_t rank = my.params.meet.comm.rank;
    const int32_t limit = limit_of(my.smem.meet.headers[rank]);
    const int32_t num_slots = slots_here(my);
    const bool is_token = my.params.recv_layout == RecvLayout::kToken;
    for (int32_t local = my.block.thread_idx(); local < my.kNumLocal; local += my.block.size()) {
        const int32_t expert = rank * my.kNumLocal + local;
        auto count = static_cast<int32_t>(my.smem.totals[kNumRanks + expert]);
        const int32_t offset = my.smem.offsets[expert];
        const int32_t room = offset < limit ? limit - offset : 0;
        if (!is_token && count > room) count = room;
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
        for (int32_t local = 0; local < my.kNumLocal; ++local) {
            num_recv +=
                static_cast<int32_t>(my.smem.totals[kNumRanks + rank * my.kNumLocal + local]);
        }
    }
    *my.params.num_recv = num_recv;
    if (num_slots > limit) device::atom_or_relaxed_gpu(my.params.overflow, 1u);
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
template <int32_t kNumRanks, int32_t kNumExperts>
DEEPCOMM_DEVICE bool settle_counts(const CountBlock<kNumRanks, kNumExperts>& my) {
    const bool is_first_block = my.block.block_idx() == 0;
    const MeetStatus status = my.smem.meet.status;
    if (status != MeetStatus::kGood) {
        if (!is_first_block || !my.block.is_leader()) return true;
        report_trouble(my.params.meet, my.smem.meet);
        send_report(my.params, status);
        return true;
    }
    if (!gather_counts(my)) return false;
    place_groups(my);
    if (is_first_block) {
        write_outputs(my);
        write_plan(my);
        if (my.block.is_leader()) send_report(my.params, status);
    }
    start_slots(my);
    assign_slots(my);
    return true;
}

template <int32_t kNumRanks, int32_t kNumExperts>
__global__ void __launch_bounds__(kCountWarps * 32)
    dispatch_count(const __grid_constant__ CountParams params) {
    auto* state = static_cast<device::EpochState*>(params.meet.epoch);
    const CountBlock<kNumRanks, kNumExperts> my = {
        params,
        device::shared_storage<CountShared<kNumRanks, kNumExperts>>(),
        {},
        device::current_epoch(state)};
    count_pairs(my);
    if (!exchange_counts(my)) return;
    if (!await_headers(params.meet, my.block, device::Operation::kDispatch, my.epoch,
                       &my.smem.meet)) {
        return;
    }
    if (!settle_counts(my)) return;
    my.block.sync();  // ORDER: every thread has read the epoch
    if (my.block.is_leader()) device::finish_epoch(state, my.block.num_blocks());
}

}  // namespace deepcomm::kernels
