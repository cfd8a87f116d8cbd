// SPDX-License-Identifier: Apache-2.0
// dispatch_send: meets if nobody has, sends, expands, arrives. PROTOCOLS.md: dispatch_send.
#pragma once

#include "kernels/dispatch/arrive.cuh"
#include "kernels/dispatch/expand.cuh"
#include "kernels/dispatch/pad.cuh"

namespace deepcomm::kernels {

/// Where every rank wants its rows; a thread a rank.
template <typename Spec>
DEEPCOMM_DEVICE void find_destinations(const SendBlock<Spec>& my) {
    for (int32_t dst = my.block.thread_idx(); dst < Spec::kNumRanks; dst += my.block.size()) {
        const Header& header = my.smem.meet.headers[dst];
        const auto generation = static_cast<int32_t>(header.landing & kLandingIndexMask);
        my.smem.destinations[dst] = {
            my.params.meet.comm.bases[dst] + my.params.meet.layout.generation(generation),
            limit_of(header), (header.landing & kLandingIdsAre64) != 0};
    }
    my.block.sync();  // ORDER: the table before its readers
}

/// The meeting: held here for a cached dispatch, else what dispatch_count has heard.
template <typename Spec>
DEEPCOMM_DEVICE bool meet_or_recall(const SendBlock<Spec>& my) {
    if (my.params.opens && my.block.block_idx() == 0) {
        publish_header(my.params.meet, my.block, my.epoch, 0);
    }
    return await_headers(my.params.meet, my.block, device::Operation::kDispatch, my.epoch,
                         &my.smem.meet);
}

/// This warp's part, then the block's arrival.
template <typename Spec, typename Send>
DEEPCOMM_DEVICE bool exchange_rows(const SendBlock<Spec>& my, Send&& send) {
    find_destinations(my);
    const bool is_complete = send();
    pad_rows(my);
    if (!my.block.sync_and(is_complete)) return false;  // ORDER: all stores before the arrival
    signal_arrival(my);
    if (my.block.block_idx() != 0) return true;
    if (!await_arrivals(my)) return false;
    if (my.block.is_leader()) {
        device::red_add_relaxed_gpu(&my.params.meet.counters->tokens_received,
                                    static_cast<uint64_t>(rows_here(my)));
    }
    correct_counts(my);
    return true;
}

template <typename Spec>
DEEPCOMM_DEVICE bool have_met(const SendBlock<Spec>& my, bool is_complete) {
    return is_complete && my.smem.meet.status == MeetStatus::kGood;
}

/// Loads its first rows, which need no peer, while the ranks meet; then exchanges.
template <typename Spec>
DEEPCOMM_DEVICE bool move(const SendBlock<Spec>& my) {
    const int32_t w = my.warp.warp_idx();
    typename Spec::Pipe pipe = {my.smem.bank.bytes[w], my.smem.bank.full[w]};
    if (my.warp.is_leader()) pipe.init();
    my.warp.sync();  // ORDER: the mbarriers before the lanes that wait at them
    TokenCursor<Spec> loads(my);
    (void)load_ahead(pipe, loads);
    const bool is_met = meet_or_recall(my);
    if (!have_met(my, is_met)) {
        pipe.drain();
        return is_met;
    }
    return exchange_rows(my, [&]() {
        if (!send_tokens(my, pipe, loads)) return false;
        if (!Spec::kByExpert) return true;
        typename Spec::LandedPipe landed = {pipe.stages, pipe.full, pipe.num_loaded, pipe.num_used};
        return expand_rows(my, landed);
    });
}

/// The same for a warp that moves no rows.
template <typename Spec>
DEEPCOMM_DEVICE bool pair(const SendBlock<Spec>& my) {
    const bool is_met = meet_or_recall(my);
    if (!have_met(my, is_met)) return is_met;
    return exchange_rows(my, [&]() {
        if constexpr (Spec::kPairers > 0) send_pairs(my);
        return true;
    });
}

/// Ends the operation for this block: the rounds count on, also where nothing was exchanged.
template <typename Spec>
DEEPCOMM_DEVICE void finish(const SendBlock<Spec>& my, bool has_exchanged) {
    my.block.sync();  // ORDER: every thread has read epoch and round
    if (!my.block.is_leader()) return;
    const int32_t num_blocks = my.block.num_blocks();
    if (my.params.opens) {
        device::finish_epoch(static_cast<device::EpochState*>(my.params.meet.epoch), num_blocks);
    }
    if (has_exchanged) {
        device::finish_epoch(static_cast<device::EpochState*>(my.params.round), num_blocks);
    }
}

template <int32_t kNumRanks, int32_t kHidden, int32_t kWire, bool kByExpert>
__global__ void __launch_bounds__(SendSpec<kNumRanks, kHidden, kWire, kByExpert>::kWarps * 32, 1)
    dispatch_send(const __grid_constant__ SendParams params) {
    using Spec = SendSpec<kNumRanks, kHidden, kWire, kByExpert>;
    const auto* state = static_cast<const device::EpochState*>(params.meet.epoch);
    const SendBlock<Spec> my = {
        params,
        device::shared_storage<SendShared<kNumRanks, kHidden, kWire, kByExpert>>(),
        {},
        {},
        params.opens ? device::current_epoch(state) : state->epoch,
        device::current_epoch(static_cast<const device::EpochState*>(params.round))};
    if (!(my.is_mover() ? move(my) : pair(my))) return;
    const bool is_good = my.smem.meet.status == MeetStatus::kGood;
    if (!is_good && params.opens && my.block.block_idx() == 0 && my.block.is_leader()) {
        report_trouble(params.meet, my.smem.meet);
    }
    finish(my, is_good);
}

}  // namespace deepcomm::kernels
