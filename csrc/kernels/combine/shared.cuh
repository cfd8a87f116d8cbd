// SPDX-License-Identifier: Apache-2.0
// combine: its compile-time choices, its shared memory and what a warp knows of it.
#pragma once

#include "kernels/combine/params.hpp"
#include "kernels/meet/meet.cuh"
#include "kernels/rows/pipe.cuh"
#include "kernels/rows/sum.cuh"
#include "layout/plan.hpp"

namespace deepcomm::kernels {

template <int32_t kNumRanks_, int32_t kHidden_, bool kByExpert_>
struct CombineSpec {
    static constexpr int32_t kNumRanks = kNumRanks_;
    static constexpr int32_t kHidden = kHidden_;
    static constexpr bool kByExpert = kByExpert_;
    static constexpr int32_t kRowBytes = 2 * kHidden;
    // TOKEN rows are pushed by bulk copies, which take few warps; sums by experts take many.
    static constexpr int32_t kWarps = kByExpert ? 12 : 20;
    static constexpr int32_t kStageBytes = static_cast<int32_t>(round_up(kRowBytes, 128));
    static constexpr int32_t kPushWarps =
        kByExpert ? 6 : clamp(kStageBudgetBytes / (2 * kStageBytes), 1, 4);
    static constexpr int32_t kReduceWarps = kWarps - kPushWarps;
    static constexpr int32_t kStages =
        clamp(kStageBudgetBytes / (kPushWarps * kStageBytes), 1, kMaxStages);

    using Bank = StageBank<kPushWarps, kStages, kStageBytes>;
    using Pipe = RowPipe<kStages, kStageBytes, kRowBytes, kRowBytes>;
};

/// The handle's plan, and the meeting.
template <int32_t kNumRanks>
struct CombineTables {
    MeetTable<kNumRanks> meet;
    int32_t plan[layout::PlanLayout{kNumRanks}.num_words()];
};

template <int32_t kNumRanks, int32_t kHidden, bool kByExpert>
struct CombineShared {
    CombineTables<kNumRanks> tables;
    typename CombineSpec<kNumRanks, kHidden, kByExpert>::Bank bank;
};

template <int32_t kNumRanks, int32_t kHidden>
struct CombineShared<kNumRanks, kHidden, true> {
    CombineTables<kNumRanks> tables;
};

/// What all warps of a block share.
template <typename Spec>
struct CombineBlock {
    const CombineParams& params;
    CombineShared<Spec::kNumRanks, Spec::kHidden, Spec::kByExpert>& smem;
    device::Block block;
    device::Warp warp;
    uint32_t epoch;

    DEEPCOMM_DEVICE int32_t rank() const { return params.meet.comm.rank; }
    DEEPCOMM_DEVICE layout::PlanLayout words() const { return {Spec::kNumRanks}; }
    DEEPCOMM_DEVICE int32_t rows_from(int32_t src) const {
        return smem.tables.plan[words().rows_from() + src];
    }
    DEEPCOMM_DEVICE int32_t push_base(int32_t src) const {
        return smem.tables.plan[words().push_base() + src];
    }
    DEEPCOMM_DEVICE int32_t sent_base(int32_t dst) const {
        return smem.tables.plan[words().sent_base() + dst];
    }
    DEEPCOMM_DEVICE int32_t combine_base(int32_t dst) const {
        return smem.tables.plan[words().combine_base() + dst];
    }
    DEEPCOMM_DEVICE int32_t capacity(int32_t dst) const {
        return smem.tables.plan[words().capacity() + dst];
    }
    /// Rows of a source that are here: TOKEN rows beyond the capacity are not.
    DEEPCOMM_DEVICE int32_t num_rows_of(int32_t src) const {
        const int32_t begin = rows_from(src);
        int32_t end = rows_from(src + 1);
        if (!Spec::kByExpert && end > capacity(rank())) end = capacity(rank());
        return end > begin ? end - begin : 0;
    }
    DEEPCOMM_DEVICE const unsigned char* output_row(int32_t row) const {
        return params.outputs.rows + row * params.outputs.row_stride;
    }
    /// Row of a rank's combine region.
    DEEPCOMM_DEVICE unsigned char* combine_row(int32_t at_rank, int32_t row) const {
        return params.meet.comm.bases[at_rank] + params.meet.layout.combine_rows +
               static_cast<int64_t>(row) * Spec::kRowBytes;
    }
    DEEPCOMM_DEVICE float* combine_weights(int32_t at_rank, int32_t row) const {
        return reinterpret_cast<float*>(params.meet.comm.bases[at_rank] +
                                        params.meet.layout.combine_weights) +
               static_cast<int64_t>(row) * params.num_topk;
    }
    DEEPCOMM_DEVICE uint32_t* pushed_word(int32_t at_rank, int32_t src, int32_t chunk) const {
        return reinterpret_cast<uint32_t*>(params.meet.comm.bases[at_rank] +
                                           params.meet.layout.pushed_chunk(src, chunk));
    }
};

}  // namespace deepcomm::kernels
