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

/// One part of a token's row, from two of its ranks: loaded together, added in their order.
template <typename Spec>
struct RankPair {
    using Batch = PacketBatch<TokenSum<Spec>::kCount>;

    int32_t ranks[2];  ///< ascending; num_ranks: none
    Batch batches[2];

    static DEEPCOMM_DEVICE PacketRange packets_of(const LowLatencyParams& params,
                                                  const LowLatencyTurn& turn, int32_t rank,
                                                  int32_t token) {
        const int64_t offset = params.map.row_offset(turn.slot, rank, token);
        return {packets_at(params.local, offset) + params.num_topk, Spec::kNumThreads,
                Spec::kPackets};
    }

    /// The first rank of the token after one. All lanes call it.
    static DEEPCOMM_DEVICE int32_t rank_after(const LowLatencyParams& params, int32_t my_rank,
                                              int32_t rank) {
        do ++rank;
        DEEPCOMM_NO_UNROLL
        while (rank < params.map.num_ranks && device::warp_ballot(my_rank == rank) == 0);
        return rank;
    }

    /// Finds and loads the two after a rank.
    DEEPCOMM_DEVICE void load(const LowLatencyParams& params, const LowLatencyTurn& turn,
                              int32_t token, int32_t my_rank, int32_t rank, int32_t first) {
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < 2; ++i) {
            ranks[i] = rank = rank_after(params, my_rank, rank);
            if (rank >= params.map.num_ranks) continue;
            batches[i].load(packets_of(params, turn, rank, token), first);
        }
    }

    /// Waits for both and adds them.
    DEEPCOMM_DEVICE Arrival add_to(const LowLatencyParams& params, const LowLatencyTurn& turn,
                                   int32_t token, int32_t first, TokenSum<Spec>* sum) {
        Arrival arrival = Arrival::kHere;
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < 2; ++i) {
            if (ranks[i] >= params.map.num_ranks) continue;
            const PacketRange range = packets_of(params, turn, ranks[i], token);
            const device::WaitSite site = {Operation::kLowLatencyCombine, device::Role::kReceive,
                                           ranks[i], token};
            const Arrival one = batches[i].wait(params, site, range, first, turn.tag);
            if (one == Arrival::kHere) {
                sum->add(batches[i]);
            } else {
                arrival = arrival == Arrival::kFailed ? arrival : one;
                if (one == Arrival::kAbsent) mask_late_peer(params, ranks[i]);
            }
        }
        return arrival;
    }
};

/// The token that a block receives, and what of it is on its way.
template <typename Spec>
struct Awaited {
    int32_t token;
    int32_t my_rank;      ///< of the expert in a lane's column, or -1
    RankPair<Spec> pair;  ///< the first two ranks, of the first part

    template <typename Shared>
    DEEPCOMM_DEVICE void load(const LowLatencyCombineParams& params, const device::Block& block,
                              const LowLatencyTurn& turn, int32_t expert, const Shared& shared) {
        my_rank = rank_of_expert(params, shared, expert);
        pair.load(params.base, turn, token, my_rank, -1, block.thread_idx());
    }
};

/// Sums one part of a token's row over its ranks; the first two are on their way.
template <typename Spec>
DEEPCOMM_DEVICE Arrival sum_part(const LowLatencyParams& params, const LowLatencyTurn& turn,
                                 Awaited<Spec>& awaited, int32_t first, TokenSum<Spec>* sum) {
    RankPair<Spec>& pair = awaited.pair;
    Arrival arrival = Arrival::kHere;
    sum->clear();
    DEEPCOMM_NO_UNROLL
    while (pair.ranks[0] < params.map.num_ranks) {
        const Arrival both = pair.add_to(params, turn, awaited.token, first, sum);
        arrival = arrival == Arrival::kFailed ? arrival : both;
        if (pair.ranks[1] >= params.map.num_ranks) break;
        pair.load(params, turn, awaited.token, awaited.my_rank, pair.ranks[1], first);
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
template <int kPhases, typename Spec>
DEEPCOMM_DEVICE bool receive_token(const LowLatencyCombineParams& params,
                                   const device::Block& block, const LowLatencyTurn& turn,
                                   Awaited<Spec>& awaited, bool is_last, const Peers& peers) {
    using Sum = TokenSum<Spec>;
    const device::Warp warp;
    const int32_t token = awaited.token;
    Arrival arrival = Arrival::kHere;
    if (params.out_topk_weights != nullptr && warp.warp_idx() == 0) {
        arrival = receive_carried(params, warp, turn, token, awaited.my_rank);
    }
    const unsigned char* bias =
        params.bias == nullptr ? nullptr : params.bias + token * params.bias_stride;
    unsigned char* out = params.out + static_cast<int64_t>(token) * Spec::kRowWords * 4;
    DEEPCOMM_NO_UNROLL
    for (int32_t i = 0; i < Sum::kAll; i += Sum::kCount) {
        const int32_t first = block.thread_idx() + i * Spec::kNumThreads;
        Sum sum;
        if (i > 0) awaited.pair.load(params.base, turn, token, awaited.my_rank, -1, first);
        const Arrival all = sum_part(params.base, turn, awaited, first, &sum);
        arrival = arrival == Arrival::kFailed ? arrival : all;
        if (!block.sync_and(arrival != Arrival::kFailed)) return false;  // as one
        const bool is_end = is_last && i + Sum::kCount >= Sum::kAll;
        const uint32_t num_before = is_end ? arrive_receive(params.base, block, turn) : 0;
        sum.store(reinterpret_cast<const uint32_t*>(bias), reinterpret_cast<uint32_t*>(out), first);
        if (is_end) end_receive<kPhases>(params.base, block, turn, peers, num_before);
    }
    return true;
}

/// The receive phase and its end, unless it fails. The packets of the block's first token are looked
/// for before the headers: what has come by then costs no trip to memory of its own.
template <int kPhases, typename Shared>
DEEPCOMM_DEVICE void receive_combine(const LowLatencyCombineParams& params,
                                     const device::Block& block, const LowLatencyTurn& turn,
                                     Shared& shared) {
    const LowLatencyParams& base = params.base;
    const uint64_t start_ns = start_of_waits(base, block);
    block.sync();  // ORDER: headers read before the weights were sent have been acted on
    const device::Warp warp;
    Awaited<typename Shared::Spec> awaited{};
    awaited.token = block.block_idx();
    awaited.load(params, block, turn, shared.experts[warp.thread_idx()], shared);
    if (!receive_combine_headers(base, block, turn, start_ns, shared)) return;
    const int32_t culprit = find_culprit(base, shared.refusals);
    if (culprit != layout::kNoPeer && block.block_idx() == 0 && block.is_leader()) {
        report_refusal(base, Operation::kLowLatencyCombine, turn, culprit, shared.refusals);
    }
    const int32_t num_tokens = culprit == layout::kNoPeer ? base.num_tokens : 0;
    if (block.block_idx() >= num_tokens) finish_receive<kPhases>(base, block, turn, shared.peers);
    bool is_loaded = !base.mask_late;  // else some ranks may take no part any more
    DEEPCOMM_NO_UNROLL
    for (; awaited.token < num_tokens; awaited.token += block.num_blocks()) {
        const bool is_last = awaited.token + block.num_blocks() >= num_tokens;
        if (!is_loaded) {
            const int32_t own = load_expert(params, warp, awaited.token);
            awaited.load(params, block, turn, own, shared);
        }
        if (!receive_token<kPhases>(params, block, turn, awaited, is_last, shared.peers)) return;
        is_loaded = false;
    }
}

}  // namespace deepcomm::kernels::low_latency
