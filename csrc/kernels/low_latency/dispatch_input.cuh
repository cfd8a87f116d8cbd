// SPDX-License-Identifier: Apache-2.0
// What a block loads of a token that it sends, ahead of its turn, and how the row is staged in shared
// memory as it travels: cast if need be, scales behind it.
#pragma once

#include "kernels/low_latency/dispatch_header.cuh"
#include "kernels/rows/cast.cuh"

namespace deepcomm::kernels::low_latency {

/// Casts vectors first, first + stagers, ... of a row, half a warp a tile; what is a tile's is done once for
/// all of them, a lane a tile. All lanes call it.
template <int kCount, typename Shared>
DEEPCOMM_DEVICE void cast_vectors(const Vec128 (&vectors)[kCount], int32_t first, Shared& shared) {
    using Spec = typename Shared::Spec;
    constexpr bool kIsFp32 = Spec::kScaleFormat == ScaleFormat::kFp32;
    const int32_t lane = device::Warp{}.thread_idx();
    const uint32_t amax = round_amax(vectors);
    const device::TileScale scale =
        kIsFp32 ? device::fp32_tile_scale(amax) : device::ue8m0_tile_scale(amax);
    DEEPCOMM_UNROLL
    for (int32_t i = 0; i < kCount; ++i) {
        const int32_t vector = first + i * Spec::kStagers;
        const float inverse = device::warp_shuffle(scale.inverse, lane_of_step(lane, i));
        if (vector >= Spec::kInputVectors) continue;
        reinterpret_cast<Fp8x8*>(shared.row)[vector] = cast_eight(vectors[i], inverse);
    }
    const int32_t step = step_of_lane(lane);
    const int32_t tile = (first + step * Spec::kStagers) / kLanesPerTile;
    if (step >= kCount || lane != lane_of_step(lane, step) || tile >= Spec::kTiles) return;
    auto* scales = reinterpret_cast<unsigned char*>(shared.row + Spec::kRowWords);
    store_scale<Spec::kTiles>(scales, tile, scale.stored, !kIsFp32);
}

/// The vectors of a row that one of the stagers stages: loaded early, used late.
template <typename Shared>
struct RowInput {
    using Spec = typename Shared::Spec;
    static constexpr int kAll = (Spec::kInputVectors + Spec::kStagers - 1) / Spec::kStagers;
    static constexpr int kCount = kAll < 4 ? kAll : 4;  ///< in flight at once

    Vec128 vectors[kCount];

    DEEPCOMM_DEVICE void load(const unsigned char* row, int32_t first) {
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kCount; ++i) {
            const int32_t vector = first + i * Spec::kStagers;
            vectors[i] =
                vector < Spec::kInputVectors
                    ? device::ld_weak_streaming(reinterpret_cast<const Vec128*>(row) + vector)
                    : Vec128{};
        }
    }

    DEEPCOMM_DEVICE void stage(int32_t first, Shared& shared) const {
        if constexpr (Spec::kCasts) return cast_vectors(vectors, first, shared);
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kCount; ++i) {
            const int32_t vector = first + i * Spec::kStagers;
            if (vector >= Spec::kInputVectors) continue;
            reinterpret_cast<Vec128*>(shared.row)[vector] = vectors[i];
        }
    }
};

/// Zeros behind the row, and scales that come with it.
template <typename Shared>
DEEPCOMM_DEVICE void stage_tail(const LowLatencyDispatchParams& params, const device::Block& block,
                                int32_t token, Shared& shared) {
    using Spec = typename Shared::Spec;
    constexpr int32_t kGiven = Spec::kCasts ? 0 : Spec::kScaleWords;
    const uint32_t* scales = params.scales + token * params.scale_stride;
    const int32_t first_zero = Spec::kRowWords + Spec::kScaleWords;
    DEEPCOMM_NO_UNROLL
    for (int32_t word = Spec::kRowWords + block.thread_idx(); word < Spec::kStagedWords;
         word += Spec::kStagers) {
        if (word < Spec::kRowWords + kGiven) shared.row[word] = scales[word - Spec::kRowWords];
        if (word >= first_zero) shared.row[word] = 0;
    }
    // The absent tiles of the last word of exponents.
    if (Spec::kCasts && Spec::kScaleFormat == ScaleFormat::kUe8m0 && block.is_leader()) {
        auto* bytes = reinterpret_cast<uint8_t*>(shared.row + Spec::kRowWords);
        DEEPCOMM_NO_UNROLL
        for (int32_t tile = Spec::kTiles; tile < 4 * Spec::kScaleWords; ++tile) bytes[tile] = 0;
    }
}

/// What the threads of a block load of a token, ahead of its turn.
template <typename Shared>
struct TokenInput {
    static constexpr int32_t kEarlier =
        5;  ///< ids in flight at once: all of them at T = 128, K = 8

    int32_t token;
    IdBatch<1> own;             ///< of a lane's column
    float weight;               ///< likewise; in the last warp
    RowInput<Shared> row;       ///< in the others, as what follows
    IdBatch<kEarlier> earlier;  ///< of tokens before this one

    DEEPCOMM_DEVICE void load(const LowLatencyDispatchParams& params, const device::Block& block,
                              int32_t token_idx) {
        const int32_t num_topk = params.base.num_topk, lane = device::Warp{}.thread_idx();
        const int32_t first = token_idx * num_topk;
        token = token_idx;
        own.load(params, {first + lane, 0, first + num_topk});
        weight = 0;
        if (!is_in_last_warp(block)) {
            earlier.load(params, earlier_ids(params, block, 0));
            row.load(params.x + token * params.x_stride, block.thread_idx());
        } else if (params.topk_weights != nullptr && lane < num_topk) {
            weight = params.topk_weights[first + lane];
        }
    }

    /// The ids before the token that a thread compares, from a round on.
    DEEPCOMM_DEVICE IdRange earlier_ids(const LowLatencyDispatchParams& params,
                                        const device::Block& block, int32_t round) const {
        return {block.thread_idx() + round * Shared::Spec::kStagers, Shared::Spec::kStagers,
                token * params.base.num_topk};
    }
};

}  // namespace deepcomm::kernels::low_latency
