// SPDX-License-Identifier: Apache-2.0
// Role: a block receives tokens. It polls the partial sums of each token's ranks in ascending order,
// adds them in FP32, adds the bias and rounds once. PROTOCOLS.md: low_latency_combine.
#pragma once

#include "kernels/low_latency/combine_send.cuh"

namespace deepcomm::kernels::low_latency {

/// The words of a row that belong to the packets of one thread, as FP32.
template <typename Spec>
struct TokenSum {
    static constexpr int kAll = (Spec::kPackets + Spec::kNumThreads - 1) / Spec::kNumThreads;
    static constexpr int kCount = kAll < 5 ? kAll : 5;
    static constexpr int kWords = static_cast<int>(layout::kPacketWords);

    float low[kCount][kWords];
    float high[kCount][kWords];

    DEEPCOMM_DEVICE void clear() {
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kCount; ++i) {
            DEEPCOMM_UNROLL
            for (int32_t part = 0; part < kWords; ++part) low[i][part] = high[i][part] = 0;
        }
    }

    DEEPCOMM_DEVICE void add_word(int32_t i, int32_t part, uint32_t pair) {
        low[i][part] = device::fadd_rn(low[i][part], device::bf16x2_low(pair));
        high[i][part] = device::fadd_rn(high[i][part], device::bf16x2_high(pair));
    }

    DEEPCOMM_DEVICE void add(const PacketBatch<kCount>& batch) {
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kCount; ++i) {
            DEEPCOMM_UNROLL
            for (int32_t part = 0; part < kWords; ++part) {
                add_word(i, part, batch.packets[i].words[part]);
            }
        }
    }

    /// Adds the bias, if there is one, and writes the words of packets first, first + threads, ...
    DEEPCOMM_DEVICE void store(const uint32_t* bias, uint32_t* out, int32_t first) {
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kCount; ++i) {
            DEEPCOMM_UNROLL
            for (int32_t part = 0; part < kWords; ++part) {
                const int32_t word = (first + i * Spec::kNumThreads) * kWords + part;
                if (word >= Spec::kRowWords) continue;
                if (bias != nullptr) add_word(i, part, bias[word]);
                out[word] = device::bf16x2_from_floats(low[i][part], high[i][part]);
            }
        }
    }
};

/// The columns of a token: lane k knows the rank of its expert, or -1.
template <typename Shared>
DEEPCOMM_DEVICE int32_t find_rank(const LowLatencyCombineParams& params, const device::Warp& warp,
                                  const Shared& shared, int32_t token) {
    const int32_t k = warp.thread_idx();
    if (k >= params.base.num_topk) return -1;
    const int64_t index = static_cast<int64_t>(token) * params.base.num_topk + k;
    return rank_of_expert(params, shared, index);
}

/// Sums one part of a token's row over its ranks.
template <typename Shared>
DEEPCOMM_DEVICE Arrival sum_part(const LowLatencyCombineParams& params, const LowLatencyTurn& turn,
                                 int32_t token, int32_t my_rank, int32_t first,
                                 TokenSum<typename Shared::Spec>* sum) {
    using Spec = typename Shared::Spec;
    const LowLatencyParams& base = params.base;
    Arrival arrival = Arrival::kHere;
    sum->clear();
    for (int32_t rank = 0; rank < base.map.num_ranks; ++rank) {
        if (device::warp_ballot(my_rank == rank) == 0) continue;
        const Vec128* head = packets_at(base.local, base.map.row_offset(turn.slot, rank, token));
        const PacketRange row = {head + base.map.num_topk, Spec::kNumThreads, Spec::kPackets};
        const device::WaitSite site = {Operation::kLowLatencyCombine, device::Role::kReceive, rank,
                                       token};
        PacketBatch<TokenSum<Spec>::kCount> batch{};
        batch.load(row, first);
        const Arrival all = batch.wait(base, site, row, first, turn.tag);
        if (all == Arrival::kHere) {
            sum->add(batch);
        } else {
            arrival = arrival == Arrival::kFailed ? arrival : all;
            if (all == Arrival::kAbsent) mask_late_peer(base, rank);
        }
    }
    return arrival;
}

/// The carried values of a token, by the first warp.
DEEPCOMM_DEVICE Arrival receive_carried(const LowLatencyCombineParams& params,
                                        const device::Warp& warp, const LowLatencyTurn& turn,
                                        int32_t token, int32_t my_rank) {
    const LowLatencyParams& base = params.base;
    const int32_t k = warp.thread_idx();
    if (k >= base.num_topk) return Arrival::kHere;
    float value = 0;
    Arrival arrival = Arrival::kHere;
    if (my_rank >= 0) {
        const Vec128* head = packets_at(base.local, base.map.row_offset(turn.slot, my_rank, token));
        const device::WaitSite site = {Operation::kLowLatencyCombine, device::Role::kReceive,
                                       my_rank, token};
        Vec128 packet{};
        const auto words = static_cast<int32_t>(layout::kPacketWords);
        arrival = wait_packet(base, site, head + k / words, turn.tag, &packet);
        value = device::float_from_bits(payload_word(packet, k % words));
    }
    params.out_topk_weights[static_cast<int64_t>(token) * base.num_topk + k] = value;
    return arrival;
}

/// One token; is_last: of the block, which then has read all that it reads. False: leave.
template <int kPhases, typename Shared>
DEEPCOMM_DEVICE bool receive_token(const LowLatencyCombineParams& params,
                                   const device::Block& block, const LowLatencyTurn& turn,
                                   int32_t token, bool is_last, Shared& shared) {
    using Spec = typename Shared::Spec;
    using Sum = TokenSum<Spec>;
    const device::Warp warp;
    const int32_t my_rank = find_rank(params, warp, shared, token);
    Arrival arrival = Arrival::kHere;
    if (params.out_topk_weights != nullptr && warp.warp_idx() == 0) {
        arrival = receive_carried(params, warp, turn, token, my_rank);
    }
    const unsigned char* bias =
        params.bias == nullptr ? nullptr : params.bias + token * params.bias_stride;
    unsigned char* out = params.out + static_cast<int64_t>(token) * Spec::kRowWords * 4;
    for (int32_t i = 0; i < Sum::kAll; i += Sum::kCount) {
        const int32_t first = block.thread_idx() + i * Spec::kNumThreads;
        Sum sum;
        const Arrival all = sum_part<Shared>(params, turn, token, my_rank, first, &sum);
        arrival = arrival == Arrival::kFailed ? arrival : all;
        if (!block.sync_and(arrival != Arrival::kFailed)) return false;  // as one
        if (is_last && i + Sum::kCount >= Sum::kAll) {
            finish_receive(params.base, block, turn, kPhases);
        }
        sum.store(reinterpret_cast<const uint32_t*>(bias), reinterpret_cast<uint32_t*>(out), first);
    }
    return true;
}

/// The receive phase and its end, unless it fails.
template <int kPhases, typename Shared>
DEEPCOMM_DEVICE void receive_combine(const LowLatencyCombineParams& params,
                                     const device::Block& block, const LowLatencyTurn& turn,
                                     Shared& shared) {
    const LowLatencyParams& base = params.base;
    const uint64_t start_ns = start_of_waits(base, block);
    block.sync();  // ORDER: headers read before the weights were sent have been acted on
    if (!receive_combine_headers(base, block, turn, start_ns, shared)) return;
    const int32_t culprit = find_culprit(base, shared.refusals);
    if (culprit != layout::kNoPeer && block.block_idx() == 0 && block.is_leader()) {
        report_refusal(base, Operation::kLowLatencyCombine, turn, culprit, shared.refusals);
    }
    const int32_t num_tokens = culprit == layout::kNoPeer ? base.num_tokens : 0;
    if (block.block_idx() >= num_tokens) finish_receive(base, block, turn, kPhases);
    for (int32_t token = block.block_idx(); token < num_tokens; token += block.num_blocks()) {
        const bool is_last = token + block.num_blocks() >= num_tokens;
        if (!receive_token<kPhases>(params, block, turn, token, is_last, shared)) return;
    }
}

}  // namespace deepcomm::kernels::low_latency
