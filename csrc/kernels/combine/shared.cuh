// SPDX-License-Identifier: Apache-2.0
// combine: its compile-time choices, its shared memory and what a warp knows of it.
#pragma once

#include "kernels/combine/params.hpp"
#include "kernels/meet/meet.cuh"
#include "kernels/rows/pipe.cuh"
#include "kernels/rows/sum.cuh"
#include "kernels/rows/work.cuh"
#include "layout/plan.hpp"

namespace deepcomm::kernels {

/// Where a combine stands among several nodes: sums that do not leave the node stay in FP32, and are
/// added between nodes as they are.
enum CombineStage { kStageAlone, kStageInNode, kStageBetweenNodes };

constexpr int32_t kPieceUnroll = 4;  ///< vectors of a lane in a piece of a row
constexpr int32_t kMaxPushing = 12;  ///< blocks: more do not fill the link better

/// Nodes whose tokens a rank sends on; 1 where there is one node, 0 between nodes.
template <int32_t kNumRanks_, int32_t kHidden_, bool kByExpert_, int32_t kOrigins_>
struct CombineSpec {
    static constexpr int32_t kNumRanks = kNumRanks_;
    static constexpr int32_t kHidden = kHidden_;
    static constexpr bool kByExpert = kByExpert_;
    static constexpr int32_t kOrigins = kOrigins_;
    static constexpr CombineStage kStage = kOrigins == 0   ? kStageBetweenNodes
                                           : kOrigins == 1 ? kStageAlone
                                                           : kStageInNode;
    static constexpr bool kPushes = kStage != kStageBetweenNodes;
    static constexpr int32_t kNumOrigins = kOrigins == 0 ? 1 : kOrigins;
    static constexpr layout::PlanLayout kWords = {kNumRanks, kNumOrigins};
    /// Blocks of rows that go to a rank; those of the expert layouts hold rows of all origins.
    static constexpr int32_t kRowOrigins = kByExpert ? 1 : kNumOrigins;
    static constexpr int32_t kRowBytes = 2 * kHidden;
    // TOKEN rows are pushed by a few warps, none between nodes; all others reduce, and all of an expert
    // layout do both.
    static constexpr int32_t kWarps = kByExpert ? 12 : kStage == kStageAlone ? 20 : 16;
    // What a stage holds: a row, or one part of the rows of several terms.
    static constexpr int32_t kRowVectors = kHidden / kChannelsOfVector;
    static constexpr int32_t kPieceVectors = clamp(kRowVectors, 1, kPieceUnroll* device::kWarpSize);
    static constexpr int32_t kPieceBytes = kPieceVectors * 16;
    static constexpr int32_t kNumParts = static_cast<int32_t>(ceil_div(kRowVectors, kPieceVectors));
    static constexpr int32_t kTermsAtOnce = 4;
    static constexpr int32_t kStageBytes =
        static_cast<int32_t>(round_up(kByExpert ? kTermsAtOnce * kPieceBytes : kRowBytes, 128));
    static constexpr int32_t kPushWarps =
        kByExpert ? kWarps : clamp(kStageBudgetBytes / (2 * kStageBytes), 1, 4);
    static constexpr int32_t kStages =
        clamp(kStageBudgetBytes / (kPushWarps * kStageBytes), 1, kMaxStages);
    // Sums leave from registers: no store reads a stage.
    static constexpr int32_t kMaxUnread = kByExpert ? 0 : kUnreadOf<kStages>;

    using Bank = StageBank<kPushWarps, kStages, kStageBytes>;
    using Pipe = RowPipe<kStages, kStageBytes, kRowBytes, kRowBytes, kMaxUnread>;

    DEEPCOMM_DEVICE static constexpr int32_t vectors_of(int32_t part) {
        constexpr int32_t kLast = kRowVectors - (kNumParts - 1) * kPieceVectors;
        return part + 1 == kNumParts ? kLast : kPieceVectors;
    }
    /// Terms [begin, end) share a stage.
    DEEPCOMM_DEVICE static constexpr int32_t end_of_round(int32_t begin, int32_t count) {
        return begin + kTermsAtOnce < count ? begin + kTermsAtOnce : count;
    }
};

/// The handle's plan, and the meeting.
template <typename Spec>
struct CombineTables {
    MeetTable<Spec::kNumRanks> meet;
    int32_t plan[Spec::kWords.num_words()];
    /// Inside a node: first row of this rank's sums in the combine region of each origin's rank.
    int32_t rail_base[Spec::kNumOrigins];
};

template <int32_t kNumRanks, int32_t kHidden, bool kByExpert, int32_t kOrigins>
struct CombineShared {
    using Spec = CombineSpec<kNumRanks, kHidden, kByExpert, kOrigins>;

    CombineTables<Spec> tables;
    typename Spec::Bank bank;
};

/// Between nodes nothing is pushed.
template <int32_t kNumRanks, int32_t kHidden>
struct CombineShared<kNumRanks, kHidden, false, 0> {
    CombineTables<CombineSpec<kNumRanks, kHidden, false, 0>> tables;
};

/// What all warps of a block share.
template <typename Spec>
struct CombineBlock {
    using Shared = CombineShared<Spec::kNumRanks, Spec::kHidden, Spec::kByExpert, Spec::kOrigins>;

    const CombineParams& params;
    Shared& smem;
    device::Block block;
    device::Warp warp;
    uint32_t epoch;

    DEEPCOMM_DEVICE int32_t rank() const { return params.meet.comm.rank; }
    /// Blocks that push TOKEN rows first and reduce later, where there are enough for two kinds: the
    /// loads of a reducer would queue behind its SM's stores to the peers, which wait for the link.
    DEEPCOMM_DEVICE int32_t num_pushing() const {
        const int32_t share = block.num_blocks() * 5 / 12;
        return share < kMaxPushing ? share : kMaxPushing;
    }
    DEEPCOMM_DEVICE bool are_roles_apart() const {
        return Spec::kPushes && !Spec::kByExpert && num_pushing() > 0;
    }
    DEEPCOMM_DEVICE bool pushes() const {
        return !are_roles_apart() || block.block_idx() < num_pushing();
    }
    DEEPCOMM_DEVICE bool is_pusher() const {
        return pushes() && warp.warp_idx() < Spec::kPushWarps;
    }
    // Blocks are those of layout/plan.hpp.
    DEEPCOMM_DEVICE int32_t rows_from(int32_t block) const {
        return smem.tables.plan[Spec::kWords.rows_from() + block];
    }
    DEEPCOMM_DEVICE int32_t push_base(int32_t block) const {
        return smem.tables.plan[Spec::kWords.push_base() + block];
    }
    DEEPCOMM_DEVICE int32_t sent_base(int32_t block) const {
        return smem.tables.plan[Spec::kWords.sent_base() + block];
    }
    DEEPCOMM_DEVICE int32_t combine_base(int32_t block) const {
        return smem.tables.plan[Spec::kWords.combine_base() + block];
    }
    DEEPCOMM_DEVICE int32_t capacity(int32_t dst) const {
        return smem.tables.plan[Spec::kWords.capacity() + dst];
    }
    DEEPCOMM_DEVICE int32_t tokens_from(int32_t origin) const {
        return smem.tables.plan[Spec::kWords.tokens_from() + origin];
    }
    DEEPCOMM_DEVICE int32_t num_tokens() const {
        return Spec::kNumOrigins == 1 ? params.num_tokens : tokens_from(Spec::kNumOrigins);
    }
    DEEPCOMM_DEVICE int32_t origin_of(int32_t token) const {
        int32_t found = 0;
        for (int32_t origin = 1; origin < Spec::kNumOrigins; ++origin) {
            if (token >= tokens_from(origin)) found = origin;
        }
        return found;
    }
    /// Whose token it is, where rows of origins are apart.
    DEEPCOMM_DEVICE int32_t row_origin(int32_t token) const {
        return Spec::kRowOrigins == 1 ? 0 : origin_of(token);
    }
    /// Inside a node: whose tokens are those of this rank.
    DEEPCOMM_DEVICE int32_t own_origin() const { return params.rail.comm.rank; }
    /// Rows of a block that are here: TOKEN rows beyond the capacity are not.
    DEEPCOMM_DEVICE int32_t num_rows_of(int32_t block) const {
        const int32_t begin = rows_from(block);
        int32_t end = rows_from(block + 1);
        if (!Spec::kByExpert && end > capacity(rank())) end = capacity(rank());
        return end > begin ? end - begin : 0;
    }
    DEEPCOMM_DEVICE const unsigned char* output_row(int32_t row) const {
        return params.outputs.rows + row * params.outputs.row_stride;
    }
    /// Row of this rank's combine region.
    DEEPCOMM_DEVICE const unsigned char* combine_row(int32_t row) const {
        return params.meet.comm.bases[rank()] + params.meet.layout.areas.combine_rows +
               static_cast<int64_t>(row) * Spec::kRowBytes;
    }
    DEEPCOMM_DEVICE const float* combine_weights(int32_t row) const {
        return weights_at(rank(), params.meet.layout.areas, row);
    }
    /// Row of a peer's combine region.
    DEEPCOMM_DEVICE unsigned char* pushed_row(int32_t peer, int32_t row) const {
        return params.meet.comm.bases[peer] + params.meet.there.combine_rows +
               static_cast<int64_t>(row) * Spec::kRowBytes;
    }
    DEEPCOMM_DEVICE float* pushed_weights(int32_t peer, int32_t row) const {
        return weights_at(peer, params.meet.there, row);
    }
    DEEPCOMM_DEVICE float* weights_at(int32_t at_rank, const layout::RowAreas& areas,
                                      int32_t row) const {
        return reinterpret_cast<float*>(params.meet.comm.bases[at_rank] + areas.combine_weights) +
               static_cast<int64_t>(row) * params.num_topk;
    }
    // Inside a node: where the sum of token number `row` of another origin goes.
    DEEPCOMM_DEVICE unsigned char* rail_row(int32_t origin, int32_t row) const {
        const RailTarget& rail = params.rail;
        const int64_t index = smem.tables.rail_base[origin] + row;
        return rail.comm.bases[origin] + rail.there.combine_rows + index * Spec::kRowBytes;
    }
    DEEPCOMM_DEVICE float* rail_weights(int32_t origin, int32_t row) const {
        const RailTarget& rail = params.rail;
        const int64_t index = smem.tables.rail_base[origin] + row;
        return reinterpret_cast<float*>(rail.comm.bases[origin] + rail.there.combine_weights) +
               index * params.num_topk;
    }
    DEEPCOMM_DEVICE uint32_t* rail_word(int32_t origin, int32_t chunk) const {
        const RailTarget& rail = params.rail;
        return reinterpret_cast<uint32_t*>(rail.comm.bases[origin] +
                                           rail.layout.pushed_chunk(rail.comm.rank, chunk));
    }
    /// The block is that of the rank that reads the word.
    DEEPCOMM_DEVICE uint32_t* pushed_word(int32_t at_rank, int32_t block, int32_t chunk) const {
        return reinterpret_cast<uint32_t*>(params.meet.comm.bases[at_rank] +
                                           params.meet.layout.pushed_chunk(block, chunk));
    }
};

/// By all threads of a block; they see it after its next barrier.
template <typename Spec>
DEEPCOMM_DEVICE void load_plan(const CombineBlock<Spec>& my) {
    auto& tables = my.smem.tables;
    for (int32_t i = my.block.thread_idx(); i < Spec::kWords.num_words(); i += my.block.size()) {
        tables.plan[i] = my.params.table.plan[i];
    }
    if constexpr (Spec::kStage == kStageInNode) {
        constexpr layout::PlanLayout kRailWords = {Spec::kNumOrigins, 1};
        const int32_t* bases = my.params.rail.plan + kRailWords.push_base();
        for (int32_t i = my.block.thread_idx(); i < Spec::kNumOrigins; i += my.block.size()) {
            tables.rail_base[i] = bases[i];
        }
    }
}

/// All lanes' stores of a chunk are complete: tells who awaits it.
template <typename Spec>
DEEPCOMM_DEVICE void announce(const CombineBlock<Spec>& my, uint32_t* word) {
    my.warp.sync();  // ORDER: the stores of all lanes before the leader's release
    if (!my.warp.is_leader()) return;
    // ORDER: pairs with the wait of the peer's reduce
    device::st_release_sys(word, my.epoch);
}

}  // namespace deepcomm::kernels
