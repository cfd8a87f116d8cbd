// SPDX-License-Identifier: Apache-2.0
// Role: a block receives parts of tokens. It polls the partial sums of each token's ranks in ascending
// order, adds them in FP32, adds the bias and rounds once. PROTOCOLS.md: low_latency_combine.
#pragma once

#include "kernels/low_latency/combine_forward.cuh"

namespace deepcomm::kernels::low_latency {

/// The carried values of a token, by the first warp.
template <typename Spec, typename Terms>
DEEPCOMM_DEVICE Arrival receive_carried(const LowLatencyCombineParams& params,
                                        const device::Warp& warp, const LowLatencyTurn& turn,
                                        const Awaited<Spec, Terms>& awaited) {
    const LowLatencyParams& base = params.base;
    const int32_t k = warp.thread_idx(), token = awaited.at.token;
    if (k >= base.num_topk) return Arrival::kHere;
    float value;
    const Arrival arrival = wait_carried(base, warp, turn, awaited, &value);
    params.out_topk_weights[static_cast<int64_t>(token) * base.num_topk + k] = value;
    return arrival;
}

/// Adds the bias, if there is one, and writes a thread's words of a part.
template <typename Spec>
DEEPCOMM_DEVICE void write_sum(const LowLatencyCombineParams& params, const TokenPart& at,
                               int32_t first, TokenSum<Spec>* sum) {
    const int32_t first_word = at.part * Spec::kPartWords;
    const uint32_t* bias = nullptr;
    if (params.bias != nullptr) {
        const unsigned char* row = params.bias + at.token * params.bias_stride;
        bias = reinterpret_cast<const uint32_t*>(row) + first_word;
    }
    const int64_t first_out = static_cast<int64_t>(at.token) * Spec::kRowWords + first_word;
    uint32_t* out = reinterpret_cast<uint32_t*>(params.out) + first_out;
    sum->store(bias, out, Spec::num_vectors(at.part) * Spec::kVectorWords, first);
}

/// One part of a token; is_last: of the block, which then has read all that has come. False: leave.
template <int kPhases, typename Spec, typename Terms>
DEEPCOMM_DEVICE bool receive_part(const LowLatencyCombineParams& params, const device::Block& block,
                                  const LowLatencyTurn& turn, Awaited<Spec, Terms>& awaited,
                                  bool is_last) {
    using Sum = TokenSum<Spec>;
    const device::Warp warp;
    Arrival arrival = Arrival::kHere;
    if (awaited.at.part == 0 && params.out_topk_weights != nullptr && warp.warp_idx() == 0) {
        arrival = receive_carried(params, warp, turn, awaited);
    }
    DEEPCOMM_NO_UNROLL
    for (int32_t i = 0; i < Sum::kAll; i += Sum::kCount) {
        const int32_t first = block.thread_idx() + i * Spec::kNumThreads;
        Sum sum;
        if (i > 0) awaited.load(params.base, turn, first);
        const Arrival all = sum_terms(params.base, turn, awaited, first, &sum);
        arrival = arrival == Arrival::kFailed ? arrival : all;
        const bool ends = is_last && i + Sum::kCount >= Sum::kAll;
        if (ends) device::admit_next_kernel();
        if (!block.sync_and(arrival != Arrival::kFailed)) return false;  // as one
        if (ends) finish_receive<kPhases>(params.base, block, turn);
        write_sum(params, awaited.at, first, &sum);
    }
    return true;
}

/// Finds the terms of a token by the expert in a lane's column, and loads the first of them of its part.
template <typename Shared>
DEEPCOMM_DEVICE void await_token(const LowLatencyCombineParams& params, const device::Block& block,
                                 const LowLatencyTurn& turn, int32_t expert,
                                 AwaitedToken<Shared>& awaited, const Shared& shared) {
    awaited.mine = awaited.terms.of(params.base, rank_of_expert(params, shared, expert));
    awaited.load(params.base, turn, block.thread_idx());
}

/// Waits for all headers; early: that of the thread's first. Gives the number of tokens to receive:
/// none where a rank has ended the operation. False: leave.
template <typename Shared>
DEEPCOMM_DEVICE bool open_receive(const LowLatencyCombineParams& params, const device::Block& block,
                                  const CombineHeaders& headers, const Vec128& early,
                                  Shared& shared, int32_t* num_tokens) {
    const LowLatencyParams& base = params.base;
    const LowLatencyTurn& turn = headers.turn;
    if (!receive_combine_headers(base, block, headers, early, shared)) return false;
    const int32_t culprit = find_culprit(base, shared.refusals);
    if (culprit != layout::kNoPeer && block.block_idx() == 0 && block.is_leader()) {
        report_refusal(base, Operation::kLowLatencyCombine, turn, culprit, shared.refusals);
    }
    if (culprit != layout::kNoPeer) {
        if constexpr (!Shared::kHasNodes) leave_all_unread(base, block, turn);
        block.sync();  // ORDER: the refusal's text has been read, and what is left unread is noted
    }
    *num_tokens = culprit == layout::kNoPeer ? base.num_tokens : 0;
    if constexpr (Shared::kHasNodes && !Shared::kIsCarried) {
        return culprit != layout::kNoPeer || forward_sums(params, block, turn, shared);
    }
    return true;
}

/// The receive phase and its end, unless it fails. The headers, and the packets of the block's first
/// part, are looked for before they are needed: what has come by then costs no trip to memory of its
/// own. Not so over several nodes, where registers are needed for what is passed on first.
template <int kPhases, typename Shared>
DEEPCOMM_DEVICE void receive_combine(const LowLatencyCombineParams& params,
                                     const device::Block& block, const LowLatencyTurn& turn,
                                     Shared& shared) {
    constexpr int32_t kNumParts = Shared::Spec::kNumParts;
    const LowLatencyParams& base = params.base;
    const CombineHeaders headers(base, turn, start_of_waits(base, block));
    Vec128 early{};
    if constexpr (!Shared::kHasNodes) early = load_combine_header(base, block, turn);
    block.sync();  // ORDER: headers read before the weights were sent have been acted on
    const device::Warp warp;
    AwaitedToken<Shared> awaited{};
    awaited.come_to(block.block_idx());
    if constexpr (!Shared::kHasNodes) {
        awaited.terms.kept = Shared::kKeepsSum ? shared.row : nullptr;
        await_token(params, block, turn, shared.experts[warp.thread_idx()], awaited, shared);
    } else {
        awaited.terms.parked = shared.parked;
        if (!open_nodes(params, block, turn, shared)) return;
    }
    int32_t num_tokens;
    if (!open_receive(params, block, headers, early, shared, &num_tokens)) return;
    const int32_t num_parts = num_tokens * kNumParts;
    if (block.block_idx() >= num_parts) finish_receive<kPhases>(base, block, turn);
    // Else some ranks may take no part any more.
    bool is_loaded = !Shared::kHasNodes && !base.mask_late;
    DEEPCOMM_NO_UNROLL
    for (int32_t i = block.block_idx(); i < num_parts; i += block.num_blocks()) {
        const bool is_last = i + block.num_blocks() >= num_parts;
        if (!is_loaded) {
            awaited.come_to(i);
            const int32_t own = load_expert(params, warp, awaited.at.token);
            if constexpr (Shared::kKeepsSum) {
                if (i >= block.num_blocks()) awaited.terms.kept = nullptr;
            }
            await_token(params, block, turn, own, awaited, shared);
        }
        if (!receive_part<kPhases>(params, block, turn, awaited, is_last)) return;
        is_loaded = false;
    }
}

}  // namespace deepcomm::kernels::low_latency
