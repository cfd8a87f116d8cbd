// SPDX-License-Identifier: Apache-2.0
// dispatch_send: meets if nobody has, sends, expands, arrives. PROTOCOLS.md: dispatch_send.
#pragma once

#include "kernels/dispatch/arrive.cuh"
#include "kernels/dispatch/expand.cuh"
#include "kernels/dispatch/lost.cuh"
#include "kernels/dispatch/pad.cuh"

namespace deepcomm::kernels {

/// Where every rank wants its rows; a thread a rank.
template <typename Spec>
DEEPCOMM_DEVICE void find_destinations(const SendBlock<Spec>& my) {
    for (int32_t dst = my.block.thread_idx(); dst < Spec::kNumRanks; dst += my.block.size()) {
        const Header& header = my.smem.meet.headers[dst];
        const auto generation = static_cast<int32_t>(header.landing & kLandingIndexMask);
        const MeetParams& meet = my.params.meet;
        const layout::RowAreas& areas = dst == my.rank() ? meet.layout.areas : meet.there;
        unsigned char* begin = meet.comm.bases[dst] + areas.generation(generation);
        my.smem.destinations[dst] = {begin + areas.landing.rows,
                                     begin + areas.landing.scales,
                                     begin + areas.landing.topk_idx,
                                     at<float>(begin, areas.landing.topk_weights),
                                     at<int32_t>(begin, areas.landing.slots),
                                     limit_of(header),
                                     (header.landing & kLandingIdsAre64) != 0};
    }
    my.block.sync();  // ORDER: the table before its readers
}

/// The meeting: held here for a cached dispatch, else what dispatch_count has heard.
template <typename Spec>
DEEPCOMM_DEVICE bool meet_or_recall(const SendBlock<Spec>& my) {
    const MeetParams& meet = my.params.meet;
    const bool is_first_block = my.block.block_idx() == 0;
    if (my.ready_epoch != my.epoch) {
        if (is_first_block && my.block.is_leader()) {
            report_no_begin(meet, device::Operation::kDispatch, my.epoch, my.ready_epoch);
        }
        return false;
    }
    if (!my.params.opens) {
        recall_headers(meet, my.block, my.epoch, &my.smem.meet);
        return true;
    }
    if (is_first_block) {
        const uint32_t refusal = refusal_of_plan(my.params.table.plan, my.words());
        publish_header(meet, my.block, my.epoch, {refusal, my.num_tokens});
    }
    return await_headers(meet, my.block, device::Operation::kDispatch, my.epoch, &my.smem.meet);
}

/// This warp's part, then the block's arrival.
template <typename Spec, typename Send>
DEEPCOMM_DEVICE bool exchange_rows(const SendBlock<Spec>& my, Send&& send) {
    find_destinations(my);
    if (my.block.block_idx() == 0) tell_of_lost(my);
    const bool is_complete = send();
    pad_rows(my);
    if (!my.block.sync_and(is_complete)) return false;  // ORDER: all stores before the arrival
    signal_arrival(my);
    if (my.block.block_idx() != 0) return true;
    if (!await_arrivals(my) || !hear_of_lost(my)) return false;
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

/// Loads its first rows while the ranks meet, unless it would have to wait for them; then exchanges. A
/// warp that moves no rows does the same but for them: all warps of a block meet at the same barriers.
template <typename Spec>
DEEPCOMM_DEVICE bool move(const SendBlock<Spec>& my) {
    const int32_t w = my.is_mover() ? my.warp.warp_idx() : 0;
    typename Spec::Pipe pipe = {my.smem.bank.bytes[w], my.smem.bank.full[w]};
    if (my.is_mover() && my.warp.is_leader()) pipe.init();
    my.warp.sync();  // ORDER: the mbarriers before the lanes that wait at them
    typename TokenCursor<Spec>::Queue queue(my.params.meet.taken, my.worker(), my.num_workers());
    TokenCursor<Spec> loads(my, queue, pipe);
    if (my.is_mover() && !my.awaits_rows()) (void)load_ahead(pipe, loads);
    const bool is_met = meet_or_recall(my);
    if (!have_met(my, is_met)) {
        pipe.drain();
        return is_met;
    }
    return exchange_rows(my, [&]() {
        if constexpr (Spec::kPairers > 0) {
            if (!my.is_mover()) {
                send_pairs(my);
                return true;
            }
        }
        if (!send_tokens(my, pipe, loads)) return false;
        if (!Spec::kByExpert) return true;
        typename Spec::LandedPipe landed = {pipe.stages, pipe.full, pipe.num_loaded, pipe.num_used};
        return expand_rows(my, landed);
    });
}

/// By one thread of one block: what the meeting has come to, if it was held here.
template <typename Spec>
DEEPCOMM_DEVICE void pass_verdict_on(const SendBlock<Spec>& my) {
    if (!my.params.opens) return;
    record_verdict(my.params.meet, my.smem.meet, my.epoch);
    report_trouble(my.params.meet);
}

/// Ends the operation for this block: the rounds count on, also where nothing was exchanged.
template <typename Spec>
DEEPCOMM_DEVICE void finish(const SendBlock<Spec>& my) {
    const bool has_exchanged = my.smem.meet.status == MeetStatus::kGood;
    my.block.sync();  // ORDER: every thread has read epoch and round
    if (!my.block.is_leader()) return;
    const MeetParams& meet = my.params.meet;
    const int32_t num_blocks = my.block.num_blocks();
    if (my.block.block_idx() == 0) pass_verdict_on(my);
    if (my.params.opens) {
        device::finish_epoch(static_cast<device::EpochState*>(meet.epoch), num_blocks);
    }
    auto* round = static_cast<device::EpochState*>(my.params.round);
    const bool is_last =
        has_exchanged ? device::finish_epoch(round, num_blocks) : my.block.block_idx() == 0;
    if (!is_last) return;
    end_work(meet.taken);
    end_stage(meet, my.epoch);
}

/// The operation that this kernel belongs to: the next one, or the one that was just counted.
DEEPCOMM_DEVICE uint32_t epoch_of(const SendParams& params) {
    const auto* state = static_cast<const device::EpochState*>(params.meet.epoch);
    return params.opens ? device::current_epoch(state) : state->epoch;
}

/// A dispatch_count, or a stage before, that has failed leaves an older one, and tables of nothing.
DEEPCOMM_DEVICE uint32_t ready_epoch_of(const SendParams& params, uint32_t epoch) {
    if (!params.opens) return params.meet.verdict->met_epoch;
    const Verdict* before = params.meet.verdict_before;
    return before == nullptr ? epoch : before->done_epoch;
}

template <int32_t kNumRanks>
DEEPCOMM_DEVICE int32_t tokens_to_send(const SendParams& params, bool is_ready) {
    if (params.num_origins == 1) return params.num_tokens;
    const layout::PlanLayout words = {kNumRanks, params.num_origins};
    // A plan that was not made, since its dispatch was called off, says nothing; nor does a network
    // bring rows that mean anything where the stage before was.
    if (!is_ready || was_called_off(params.meet) || params.table.plan[words.made()] == 0) return 0;
    return params.table.plan[words.tokens_from() + params.num_origins];
}

template <int32_t kNumRanks, int32_t kHidden, int32_t kWire, bool kByExpert>
__global__ void __launch_bounds__(SendSpec<kNumRanks, kHidden, kWire, kByExpert>::kWarps * 32, 1)
    dispatch_send(const __grid_constant__ SendParams params) {
    using Spec = SendSpec<kNumRanks, kHidden, kWire, kByExpert>;
    const uint32_t epoch = epoch_of(params);
    const uint32_t ready_epoch = ready_epoch_of(params, epoch);
    const SendBlock<Spec> my = {
        params,      device::shared_storage<SendShared<kNumRanks, kHidden, kWire, kByExpert>>(),
        {},          {},
        epoch,       device::current_epoch(static_cast<const device::EpochState*>(params.round)),
        ready_epoch, tokens_to_send<kNumRanks>(params, ready_epoch == epoch)};
    if (!move(my)) return;
    finish(my);
}

}  // namespace deepcomm::kernels
