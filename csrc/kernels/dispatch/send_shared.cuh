// SPDX-License-Identifier: Apache-2.0
// dispatch_send: its compile-time choices, its shared memory and what a warp knows of it.
#pragma once

#include "kernels/dispatch/count.cuh"
#include "kernels/rows/pipe.cuh"
#include "kernels/rows/work.cuh"

namespace deepcomm::kernels {

/// How rows are given and how they travel.
constexpr int32_t kWireBf16 = 0;
constexpr int32_t kWireFp8 = 1;       ///< given with their scales
constexpr int32_t kWireCast = 2;      ///< BF16, cast to FP8 on the way
constexpr int32_t kTilesPerWord = 4;  ///< of UE8M0 scales

template <int32_t kNumRanks_, int32_t kHidden_, int32_t kWire_, bool kByExpert_>
struct SendSpec {
    static constexpr int32_t kNumRanks = kNumRanks_;
    static constexpr int32_t kHidden = kHidden_;
    static constexpr int32_t kWire = kWire_;
    static constexpr bool kByExpert = kByExpert_;
    static constexpr int32_t kNumTiles = (kHidden + kScaleTile - 1) / kScaleTile;
    // A cast takes many warps: their rows go through shared memory in parts of whole scale words.
    static constexpr int32_t kParts =
        kWire == kWireCast && kHidden % (2 * kTilesPerWord * kScaleTile) == 0 ? 2 : 1;
    static constexpr int32_t kPartHidden = kHidden / kParts;
    static constexpr int32_t kLoadBytes = kWire == kWireFp8 ? kHidden : 2 * kPartHidden;
    static constexpr int32_t kRowBytes = kWire == kWireBf16 ? 2 * kHidden : kHidden;
    static constexpr int32_t kScalesAt = static_cast<int32_t>(round_up(kLoadBytes, 16));
    static constexpr int32_t kStagedTiles = kByExpert ? kNumTiles : kNumTiles / kParts;
    static constexpr int32_t kStageBytes = static_cast<int32_t>(
        round_up(kScalesAt + (kWire == kWireBf16 ? 0 : 4 * kStagedTiles), 128));
    static_assert(!kByExpert || kScalesAt >= kRowBytes, "a row that has landed fits its stage");
    // Rows are moved by a few warps with many stages, whose loops are short: a bulk store to a peer
    // holds back what its warp issues next. Casts and copies to experts want more warps.
    static constexpr int32_t kWantedStages = kWire == kWireCast ? 2 : 3;
    static constexpr int32_t kMostMovers = kWire == kWireCast ? 7 * kParts : kByExpert ? 8 : 4;
    static constexpr int32_t kMovers =
        clamp(kStageBudgetBytes / (kWantedStages * kStageBytes), 1, kMostMovers);
    static constexpr int32_t kStages =
        clamp(kStageBudgetBytes / (kMovers * kStageBytes), 1, kMaxStages);
    // TOKEN: others see to what goes beside the rows.
    static constexpr int32_t kPairers = kByExpert ? 0 : 4;
    static constexpr int32_t kWarps = kMovers + kPairers;
    static_assert(kStages >= 2, "a row must fit twice into shared memory");

    using Bank = StageBank<kMovers, kStages, kStageBytes>;
    using Pipe = RowPipe<kStages, kStageBytes, kLoadBytes, kScalesAt>;
    // Rows that have travelled are loaded again as they are.
    using LandedPipe = RowPipe<kStages, kStageBytes, kRowBytes, kScalesAt>;
};

/// What a stage holds of a row and of its scales.
struct RowPart {
    int32_t index;
    int32_t at;  ///< bytes
    uint32_t num_bytes;
    int32_t first_word;  ///< of the scales
    int32_t num_words;

    DEEPCOMM_DEVICE bool is_first() const { return index == 0; }
    /// Whether the scales are whole multiples of what bulk copies move.
    DEEPCOMM_DEVICE bool has_bulk_scales() const { return num_words % 4 == 0; }
    DEEPCOMM_DEVICE uint32_t scale_bytes() const { return static_cast<uint32_t>(num_words) * 4; }
};

/// Where a rank's rows go: the arrays of its landing area.
struct Destination {
    unsigned char* rows;
    unsigned char* scales;
    void* topk_idx;
    float* topk_weights;
    int32_t* slots;
    int32_t limit;  ///< rows that fit there
    int32_t ids_are_64;
};

template <int32_t kNumRanks, int32_t kHidden, int32_t kWire, bool kByExpert>
struct SendShared {
    using Spec = SendSpec<kNumRanks, kHidden, kWire, kByExpert>;

    typename Spec::Bank bank;
    MeetTable<kNumRanks> meet;
    Destination destinations[kNumRanks];
    /// Rows that each warp has sent to each rank in its current chunk and in the one before.
    int32_t chunk_first[Spec::kMovers][2][kNumRanks];
    int32_t chunk_rows[Spec::kMovers][2][kNumRanks];
};

/// What all warps of a block share.
template <typename Spec>
struct SendBlock {
    using Shared = SendShared<Spec::kNumRanks, Spec::kHidden, Spec::kWire, Spec::kByExpert>;

    const SendParams& params;
    Shared& smem;
    device::Block block;
    device::Warp warp;
    uint32_t epoch;        ///< of the operation
    uint32_t round;        ///< of arrivals
    uint32_t ready_epoch;  ///< the latest operation of which what this kernel needs has ended well
    int32_t num_tokens;

    DEEPCOMM_DEVICE int32_t rank() const { return params.meet.comm.rank; }
    DEEPCOMM_DEVICE layout::PlanLayout words() const {
        return {Spec::kNumRanks, params.num_origins};
    }
    /// Of an origin, where there are several; and how many tokens there are.
    DEEPCOMM_DEVICE int32_t first_token(int32_t origin) const {
        return params.table.plan[words().tokens_from() + origin];
    }
    /// Whether rows may still be on their way. What has been cast has come.
    DEEPCOMM_DEVICE bool awaits_rows() const {
        return Spec::kWire != kWireCast && params.rail.landed != nullptr;
    }
    DEEPCOMM_DEVICE bool is_mover() const { return warp.warp_idx() < Spec::kMovers; }
    /// This warp among the movers of all blocks.
    DEEPCOMM_DEVICE int32_t worker() const {
        return block.block_idx() * Spec::kMovers + warp.warp_idx();
    }
    DEEPCOMM_DEVICE int32_t num_workers() const { return block.num_blocks() * Spec::kMovers; }
    /// Among all warps.
    DEEPCOMM_DEVICE int32_t any_worker() const {
        return block.block_idx() * Spec::kWarps + warp.warp_idx();
    }
    DEEPCOMM_DEVICE int32_t num_any_workers() const { return block.num_blocks() * Spec::kWarps; }
    /// This rank's own.
    DEEPCOMM_DEVICE const Destination& here() const { return smem.destinations[rank()]; }
    DEEPCOMM_DEVICE int32_t num_local() const {
        return params.meet.layout.shape.num_experts / Spec::kNumRanks;
    }
    DEEPCOMM_DEVICE RowPart part(int32_t index) const {
        constexpr int32_t kBytes = Spec::kRowBytes / Spec::kParts;
        const int32_t num_words = params.scale_words / Spec::kParts;
        return {index, index * kBytes, kBytes, index * num_words, num_words};
    }
    DEEPCOMM_DEVICE RowPart whole_row() const {
        return {0, 0, Spec::kRowBytes, 0, params.scale_words};
    }
    /// Whether rows of scales are whole multiples of what bulk copies move.
    DEEPCOMM_DEVICE bool has_bulk_scales() const { return params.scale_words % 4 == 0; }
    DEEPCOMM_DEVICE uint32_t scale_bytes() const {
        return static_cast<uint32_t>(params.scale_words) * 4;
    }
};

}  // namespace deepcomm::kernels
