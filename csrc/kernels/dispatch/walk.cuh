// SPDX-License-Identifier: Apache-2.0
// A warp's walk over the routing of consecutive tokens, a lane a token, 32 tokens a batch. Counting and
// slot assignment take the same batches, so that both see the same order: tokens ascending.
//
// Each lane sets its bit in a mask of every counter that its token adds to. What comes before a
// token's row in a counter is then what was counted before, and the lower bits of the mask: any lane
// can tell any pair's.
#pragma once

#include "device/device.cuh"
#include "kernels/dispatch/params.hpp"

namespace deepcomm::kernels {

constexpr int32_t kIdsAtOnce = 8;
constexpr int32_t kRanksAtOnce = 64;  ///< whose bits a lane keeps in a word

/// One (token, k) pair.
struct Pair {
    int32_t expert;         ///< or -1
    int32_t dst;            ///< rank of the expert, or -1
    int32_t token_counter;  ///< which one counts the token for that rank
    int32_t pair_counter;   ///< which one counts the pair
};

/// A lane's token.
struct WalkedToken {
    int32_t token;     ///< or -1: none
    uint32_t firsts;   ///< bit k: pair k is the token's first for its rank
    uint32_t refusal;  ///< of its pairs
};

struct Walk {
    const void* topk_idx;
    int32_t ids_are_64;
    int32_t num_topk;
    int32_t num_experts;
    int32_t num_local_experts;
    /// Whether the tokens for a rank are counted origin by origin, as pairs are.
    bool splits_ranks;
    int32_t num_origins;
    const int32_t* tokens_from;  ///< [origins + 1]
    int32_t begin;               ///< tokens
    int32_t end;

    /// Of this lane in the batch of 32 that begins with a token, or -1.
    DEEPCOMM_DEVICE int32_t token_of(int32_t first_token) const {
        const int32_t token = first_token + device::Warp{}.thread_idx();
        return token < end ? token : -1;
    }

    /// Ids of pairs begin, begin + kStride, ...; -1 for those that are not before begin + count.
    template <int32_t kStride>
    DEEPCOMM_DEVICE void load_every(int64_t begin, int32_t count,
                                    int64_t (&ids)[kIdsAtOnce]) const {
        if (ids_are_64) {
            load_as<int64_t, kStride>(begin, count, ids);
        } else {
            load_as<int32_t, kStride>(begin, count, ids);
        }
    }

    /// Ids begin_k, begin_k + 1, ... of a token, -1 beyond them and without a token: as vectors where all
    /// rows are whole ones, since lanes' rows are far apart and each load takes long.
    DEEPCOMM_DEVICE void load_ids(int32_t token, int32_t begin_k,
                                  int64_t (&ids)[kIdsAtOnce]) const {
        const int64_t begin = static_cast<int64_t>(token) * num_topk + begin_k;
        const int32_t count = token < 0 ? 0 : num_topk - begin_k;
        const bool is_aligned = reinterpret_cast<uint64_t>(topk_idx) % sizeof(device::Vec128) == 0;
        if (!ids_are_64 || num_topk % 2 != 0 || !is_aligned) {
            load_every<1>(begin, count, ids);
            return;
        }
        const auto* row = static_cast<const int64_t*>(topk_idx) + begin;
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kIdsAtOnce; i += 2) {
            device::Vec128 two = {{~0u, ~0u, ~0u, ~0u}};
            if (i < count) two = *reinterpret_cast<const device::Vec128*>(row + i);
            ids[i] = static_cast<int64_t>(static_cast<uint64_t>(two.words[1]) << 32 | two.words[0]);
            ids[i + 1] =
                static_cast<int64_t>(static_cast<uint64_t>(two.words[3]) << 32 | two.words[2]);
        }
    }

    DEEPCOMM_DEVICE bool is_expert(int64_t id) const { return id >= 0 && id < num_experts; }

    /// First counter of a token's origin.
    DEEPCOMM_DEVICE int32_t counters_of(int32_t token) const {
        int32_t first = 0;
        DEEPCOMM_NO_UNROLL
        for (int32_t origin = 1; origin < num_origins; ++origin) {
            if (token >= tokens_from[origin]) first = origin * (num_ranks() + num_experts);
        }
        return first;
    }

    /// Counters of an origin are [R] tokens for each rank, then [E] pairs for each expert.
    DEEPCOMM_DEVICE Pair name(int32_t first_counter, int64_t id) const {
        if (!is_expert(id)) return {-1, -1, 0, 0};
        const auto expert = static_cast<int32_t>(id);
        const int32_t dst = expert / num_local_experts;
        return {expert, dst, (splits_ranks ? first_counter : 0) + dst,
                first_counter + num_ranks() + expert};
    }

    DEEPCOMM_DEVICE int32_t num_ranks() const { return num_experts / num_local_experts; }

    /// All lanes of the warp: sets the bits of a batch in the masks, which this zeroes.
    DEEPCOMM_DEVICE WalkedToken mark(int32_t first_token, uint32_t* masks,
                                     int32_t num_counters) const {
        const device::Warp warp;
        WalkedToken walked = {token_of(first_token), 0, 0};
        int64_t ids[kIdsAtOnce];
        load_ids(walked.token, 0, ids);  // on their way while zeros are stored
        DEEPCOMM_NO_UNROLL
        for (int32_t i = warp.thread_idx(); i < num_counters; i += warp.size()) masks[i] = 0;
        warp.sync();  // ORDER: the zeros before the bits
        const int32_t first_counter = walked.token < 0 ? 0 : counters_of(walked.token);
        DEEPCOMM_NO_UNROLL
        for (int32_t rank = 0; rank < num_ranks(); rank += kRanksAtOnce) {
            uint64_t ranks = 0;  // the token's, of those from rank on
            DEEPCOMM_NO_UNROLL
            for (int32_t begin_k = 0; begin_k < num_topk; begin_k += kIdsAtOnce) {
                if (rank + begin_k > 0) load_ids(walked.token, begin_k, ids);
                if (rank == 0) walked.refusal |= mark_pairs(first_counter, ids, masks);
                DEEPCOMM_UNROLL
                for (int32_t i = 0; i < kIdsAtOnce; ++i) {
                    const Pair pair = name(first_counter, ids[i]);
                    const int32_t place = pair.dst - rank;
                    if (pair.dst < 0 || place < 0 || place >= kRanksAtOnce) continue;
                    const uint64_t bit = static_cast<uint64_t>(1) << place;
                    if ((ranks & bit) == 0) walked.firsts |= 1u << (begin_k + i);
                    ranks |= bit;
                }
            }
            mark_ranks(first_counter, rank, ranks, masks);
        }
        warp.sync();  // ORDER: the bits before they are counted
        return walked;
    }

  private:
    /// Values are widened when all of them are on their way.
    template <typename Id, int32_t kStride>
    DEEPCOMM_DEVICE void load_as(int64_t begin, int32_t count, int64_t (&ids)[kIdsAtOnce]) const {
        const auto* from = static_cast<const Id*>(topk_idx) + begin;
        Id loaded[kIdsAtOnce];
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kIdsAtOnce; ++i) {
            loaded[i] = i * kStride < count ? from[i * kStride] : -1;
        }
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kIdsAtOnce; ++i) ids[i] = loaded[i];
    }

    /// Sets the lane's bit for some pairs of its token; returns what is wrong with them.
    DEEPCOMM_DEVICE uint32_t mark_pairs(int32_t first_counter, const int64_t (&ids)[kIdsAtOnce],
                                        uint32_t* masks) const {
        const uint32_t bit = 1u << device::Warp{}.thread_idx();
        uint32_t before[kIdsAtOnce];
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kIdsAtOnce; ++i) {
            const Pair pair = name(first_counter, ids[i]);
            before[i] = 0;
            if (pair.expert < 0) continue;
            before[i] = device::atom_or_relaxed_block(&masks[pair.pair_counter], bit);
        }
        uint32_t refusal = 0;
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kIdsAtOnce; ++i) {
            if (!is_expert(ids[i]) && ids[i] != -1) refusal |= kExpertOutOfRange;
            if ((before[i] & bit) != 0) refusal |= kExpertTwice;
        }
        return refusal;
    }

    /// All lanes: stores the masks of ranks from first_rank on. Lanes that all add to the counters of
    /// a few ranks would wait for each other.
    DEEPCOMM_DEVICE void mark_ranks(int32_t first_counter, int32_t first_rank, uint64_t ranks,
                                    uint32_t* masks) const {
        const int32_t lane = device::Warp{}.thread_idx();
        const int32_t left = num_ranks() - first_rank;
        const int32_t count = left < kRanksAtOnce ? left : kRanksAtOnce;
        DEEPCOMM_NO_UNROLL
        for (int32_t origin = 0; origin < (splits_ranks ? num_origins : 1); ++origin) {
            const int32_t begin = origin * (num_ranks() + num_experts);
            const bool is_mine = !splits_ranks || first_counter == begin;
            DEEPCOMM_NO_UNROLL
            for (int32_t i = 0; i < count; ++i) {
                const uint32_t mask = device::warp_ballot(is_mine && (ranks >> i & 1) != 0);
                if (lane == i % device::kWarpSize) masks[begin + first_rank + i] = mask;
            }
        }
    }
};

/// All lanes of the warp: adds a batch to the warp's counters, which other lanes may read after the
/// next mark.
DEEPCOMM_DEVICE void add_marks(const uint32_t* masks, uint32_t* counters, int32_t num_counters) {
    const device::Warp warp;
    for (int32_t i = warp.thread_idx(); i < num_counters; i += warp.size()) {
        counters[i] += static_cast<uint32_t>(device::popcount(masks[i]));
    }
}

}  // namespace deepcomm::kernels
