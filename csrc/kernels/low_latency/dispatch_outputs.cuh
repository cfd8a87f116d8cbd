// SPDX-License-Identifier: Apache-2.0
// What a dispatch writes into the caller's tensors: copies of rows, counts, padding; and what it
// says where it delivers nothing.
#pragma once

#include "kernels/low_latency/dispatch_header.cuh"

namespace deepcomm::kernels::low_latency {

/// One token of one source.
struct Pair {
    int32_t source;
    int32_t token;

    /// Among all pairs of the record.
    DEEPCOMM_DEVICE int64_t index(const LowLatencyParams& params) const {
        return static_cast<int64_t>(source) * params.map.max_tokens + token;
    }
};

DEEPCOMM_DEVICE void store_id(const LowLatencyDispatchParams& params, int64_t index, int32_t id) {
    if (params.topk_idx_is_int64) {
        static_cast<int64_t*>(params.out_topk_idx)[index] = id;
    } else {
        static_cast<int32_t*>(params.out_topk_idx)[index] = id;
    }
}

/// Puts the payload of packets that have arrived in its place in shared memory.
template <typename Spec, int kCount, typename Shared>
DEEPCOMM_DEVICE void stage_packets(const PacketBatch<typename Spec::Format, kCount>& batch,
                                   int32_t first, Shared& shared) {
    DEEPCOMM_UNROLL
    for (int32_t i = 0; i < kCount; ++i) {
        const int32_t index = first + i * Spec::kNumThreads;
        if (index < Spec::kPackets) stage_packet<Spec>(batch.packets[i], index, shared.row);
    }
}

/// Writes the staged row to all its slots; the last warp has other things to do.
template <typename Shared>
DEEPCOMM_DEVICE void write_copies(const LowLatencyDispatchParams& params,
                                  const device::Block& block, const Shared& shared) {
    using Spec = typename Shared::Spec;
    const int32_t num_copies = shared.num_copies;
    constexpr int32_t kStride = Spec::kStagers;
    // The next row's packets are held meanwhile: those of longer rows leave fewer registers.
    constexpr int32_t kCount = Spec::kPacketsOfThread < 4 ? 2 : 1;
    DEEPCOMM_NO_UNROLL
    for (int32_t first = block.thread_idx(); first < Spec::kRowVectors; first += kCount * kStride) {
        Vec128 vectors[kCount];
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kCount; ++i) {
            const int32_t index = first + i * kStride;
            if (index >= Spec::kRowVectors) continue;
            vectors[i] = reinterpret_cast<const Vec128*>(shared.row)[index];
        }
        DEEPCOMM_NO_UNROLL
        for (int32_t copy = 0; copy < num_copies; ++copy) {
            unsigned char* row =
                params.out_x + static_cast<int64_t>(shared.slots[copy]) * Spec::kRowBytes;
            DEEPCOMM_UNROLL
            for (int32_t i = 0; i < kCount; ++i) {
                const int32_t index = first + i * kStride;
                if (index >= Spec::kRowVectors) continue;
                device::st_weak_streaming(reinterpret_cast<Vec128*>(row) + index, vectors[i]);
            }
        }
    }
}

/// Likewise its scales.
template <typename Shared>
DEEPCOMM_DEVICE void write_scales(const LowLatencyDispatchParams& params,
                                  const device::Block& block, const Shared& shared) {
    using Spec = typename Shared::Spec;
    const int32_t num_copies = shared.num_copies;
    DEEPCOMM_NO_UNROLL
    for (int32_t i = block.thread_idx(); i < num_copies * Spec::kScaleWords; i += Spec::kStagers) {
        const int32_t copy = i / Spec::kScaleWords, word = i % Spec::kScaleWords;
        const int64_t at = shared.scales_at[copy] + word * params.scale_word_stride;
        params.out_scales[at] = shared.row[Spec::kRowWords + word];
    }
}

/// Sums the counts of all sources.
template <typename Shared>
DEEPCOMM_DEVICE void sum_counts(const LowLatencyParams& params, const device::Block& block,
                                Shared& shared) {
    const int32_t num_local = params.map.num_local_experts;
    DEEPCOMM_NO_UNROLL
    for (int32_t expert = block.thread_idx(); expert < num_local; expert += block.size()) {
        uint32_t total = 0;
        DEEPCOMM_NO_UNROLL
        for (int32_t source = 0; source < params.map.num_ranks; ++source) {
            total += shared.counts[source * num_local + expert];
        }
        shared.totals[expert] = total;
    }
    block.sync();  // ORDER: the sums before they are used
}

/// Tokens with an expert here: bits of the words before `last`, and those of `mask` in it.
template <typename Shared>
DEEPCOMM_DEVICE int32_t count_tokens_here(const device::Warp& warp, const Shared& shared,
                                          int32_t last, uint32_t mask) {
    int32_t count = 0;
    DEEPCOMM_NO_UNROLL
    for (int32_t word = warp.thread_idx(); word <= last; word += device::kWarpSize) {
        const uint32_t counted = word < last ? device::kFullMask : mask;
        count += device::popcount(shared.token_bits[word] & counted);
    }
    return device::warp_sum(count);
}

template <typename Shared>
DEEPCOMM_DEVICE int32_t num_token_rows(const LowLatencyParams& params, const device::Warp& warp,
                                       const Shared& shared) {
    const int32_t num_words = params.map.num_ranks * params.map.token_words;
    return count_tokens_here(warp, shared, num_words - 1, device::kFullMask);
}

/// Writes the counts and adds to the statistics; by one block.
template <typename Shared>
DEEPCOMM_DEVICE void write_totals(const LowLatencyDispatchParams& params,
                                  const device::Block& block, const Shared& shared) {
    const int32_t num_local = params.base.map.num_local_experts;
    DEEPCOMM_NO_UNROLL
    for (int32_t expert = block.thread_idx(); expert < num_local; expert += block.size()) {
        const auto total = static_cast<int32_t>(shared.totals[expert]);
        params.counts[expert] = total;
        if (params.expert_token_stats == nullptr) continue;
        if (params.stats_is_int64) {
            static_cast<int64_t*>(params.expert_token_stats)[expert] += total;
        } else {
            static_cast<int32_t*>(params.expert_token_stats)[expert] += total;
        }
    }
    const device::Warp warp;
    if (warp.warp_idx() != 0) return;
    int32_t num_recv = 0;
    DEEPCOMM_NO_UNROLL
    for (int32_t expert = warp.thread_idx(); expert < num_local; expert += device::kWarpSize) {
        num_recv += static_cast<int32_t>(shared.totals[expert]);
    }
    num_recv = params.is_token_layout ? num_token_rows(params.base, warp, shared)
                                      : device::warp_sum(num_recv);
    if (warp.is_leader()) *params.num_recv = num_recv;
}

/// TOKEN: rows without a token have weight 0 and ids -1; blocks from first_block on share the work.
template <typename Shared>
DEEPCOMM_DEVICE void pad_tokens(const LowLatencyDispatchParams& params, const device::Block& block,
                                int32_t first_block, const Shared& shared) {
    const LowLatencyParams& base = params.base;
    const int64_t num_rows = num_token_rows(base, device::Warp{}, shared);
    const int64_t end =
        static_cast<int64_t>(base.map.num_ranks) * base.map.max_tokens * base.num_topk;
    const int32_t first = (block.block_idx() - first_block) * block.size() + block.thread_idx();
    const int32_t stride = (block.num_blocks() - first_block) * block.size();
    DEEPCOMM_NO_UNROLL
    for (int64_t i = num_rows * base.num_topk + first; i < end; i += stride) {
        store_id(params, i, -1);
        if (params.out_topk_weights != nullptr) params.out_topk_weights[i] = 0;
    }
}

/// EXPERT_PADDED: rows without a token have weight 0; the warps of blocks from first_block on share them.
template <typename Shared>
DEEPCOMM_DEVICE void pad_experts(const LowLatencyDispatchParams& params, const device::Block& block,
                                 int32_t first_block, const Shared& shared) {
    if (params.out_topk_weights == nullptr) return;
    constexpr int32_t kPartRows = 256;  ///< that a warp takes at once, of an expert
    constexpr int32_t kRowsAtOnce = 4 * device::kWarpSize;
    const layout::LowLatencyLayout& map = params.base.map;
    const device::Warp warp;
    const int32_t num_warps = block.size() / device::kWarpSize;
    const int32_t block_rows = map.num_ranks * map.max_tokens;
    const int32_t num_parts = (block_rows + kPartRows - 1) / kPartRows;
    const int32_t first = (block.block_idx() - first_block) * num_warps + warp.warp_idx();
    const int32_t stride = (block.num_blocks() - first_block) * num_warps;
    DEEPCOMM_NO_UNROLL
    for (int32_t item = first; item < map.num_local_experts * num_parts; item += stride) {
        const int32_t part = item / map.num_local_experts, expert = item % map.num_local_experts;
        const int32_t end =
            (part + 1) * kPartRows < block_rows ? (part + 1) * kPartRows : block_rows;
        const auto total = static_cast<int32_t>(shared.totals[expert]);
        float* weights = params.out_topk_weights + static_cast<int64_t>(expert) * block_rows;
        DEEPCOMM_NO_UNROLL
        for (int32_t row = part * kPartRows + warp.thread_idx(); row < end; row += kRowsAtOnce) {
            DEEPCOMM_UNROLL
            for (int32_t i = row; i < row + kRowsAtOnce; i += device::kWarpSize) {
                if (i >= total && i < end) weights[i] = 0;
            }
        }
    }
}

/// An operation that some rank has refused, or about which the ranks differ.
template <typename Shared>
DEEPCOMM_DEVICE void end_without_rows(const LowLatencyDispatchParams& params,
                                      const device::Block& block, const LowLatencyTurn& turn,
                                      int32_t culprit, const Shared& shared) {
    if constexpr (!Shared::kHasNodes) leave_all_unread(params.base, block, turn);
    if (block.block_idx() != 0) return;
    DEEPCOMM_NO_UNROLL
    for (int32_t i = block.thread_idx(); i < params.base.map.num_local_experts; i += block.size()) {
        params.counts[i] = 0;
    }
    if (!block.is_leader()) return;
    *params.num_recv = 0;
    report_refusal(params.base, Operation::kLowLatencyDispatch, turn, culprit, shared.refusals);
}

}  // namespace deepcomm::kernels::low_latency
