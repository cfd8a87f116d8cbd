// SPDX-License-Identifier: Apache-2.0
// A warp's walk over the routing of consecutive tokens, a lane a token. Counting and slot assignment
// take the same walk, so that both see the same order: tokens ascending.
//
// Each lane sets its bit in a mask of every counter that its token adds to. What comes before a
// token's row in a counter is then what was counted before, and the lower bits of the mask.
#pragma once

#include "device/device.cuh"
#include "kernels/dispatch/params.hpp"

namespace deepcomm::kernels {

constexpr int32_t kIdsAtOnce = 8;

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

    DEEPCOMM_DEVICE int64_t id_at(int32_t token, int32_t k) const {
        const int64_t index = static_cast<int64_t>(token) * num_topk + k;
        return ids_are_64 ? static_cast<const int64_t*>(topk_idx)[index]
                          : static_cast<const int32_t*>(topk_idx)[index];
    }

    /// Ids begin_k, begin_k + 1, ... of a token: as vectors where all rows are whole ones, since lanes'
    /// rows are far apart and each load takes long.
    DEEPCOMM_DEVICE void load_ids(int32_t token, int32_t begin_k,
                                  int64_t (&ids)[kIdsAtOnce]) const {
        const bool is_aligned = reinterpret_cast<uint64_t>(topk_idx) % sizeof(device::Vec128) == 0;
        if (!ids_are_64 || num_topk % 2 != 0 || !is_aligned) {
            DEEPCOMM_UNROLL
            for (int32_t i = 0; i < kIdsAtOnce; ++i) {
                if (begin_k + i < num_topk) ids[i] = id_at(token, begin_k + i);
            }
            return;
        }
        const auto* row = static_cast<const int64_t*>(topk_idx) +
                          static_cast<int64_t>(token) * num_topk + begin_k;
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kIdsAtOnce; i += 2) {
            if (begin_k + i >= num_topk) continue;
            const auto two = *reinterpret_cast<const device::Vec128*>(row + i);
            ids[i] = static_cast<int64_t>(static_cast<uint64_t>(two.words[1]) << 32 | two.words[0]);
            ids[i + 1] =
                static_cast<int64_t>(static_cast<uint64_t>(two.words[3]) << 32 | two.words[2]);
        }
    }

    DEEPCOMM_DEVICE bool is_expert(int64_t id) const { return id >= 0 && id < num_experts; }

    /// First counter of a token's origin.
    DEEPCOMM_DEVICE int32_t counters_of(int32_t token) const {
        const int32_t num_ranks = num_experts / num_local_experts;
        int32_t first = 0;
        for (int32_t origin = 1; origin < num_origins; ++origin) {
            if (token >= tokens_from[origin]) first = origin * (num_ranks + num_experts);
        }
        return first;
    }

    /// Counters of an origin are [R] tokens for each rank, then [E] pairs for each expert.
    DEEPCOMM_DEVICE Pair name(int32_t first_counter, int64_t id) const {
        if (!is_expert(id)) return {-1, -1, 0, 0};
        const auto expert = static_cast<int32_t>(id);
        const int32_t num_ranks = num_experts / num_local_experts;
        const int32_t dst = expert / num_local_experts;
        return {expert, dst, (splits_ranks ? first_counter : 0) + dst,
                first_counter + num_ranks + expert};
    }

    /// Calls visit(k, pair) for the pairs of a lane's token; ids are loaded several at a time.
    template <typename Visit>
    DEEPCOMM_DEVICE void for_each_pair(int32_t token, Visit&& visit) const {
        const int32_t first_counter = counters_of(token);
        for (int32_t begin_k = 0; begin_k < num_topk; begin_k += kIdsAtOnce) {
            int64_t ids[kIdsAtOnce];
            load_ids(token, begin_k, ids);
            DEEPCOMM_UNROLL
            for (int32_t i = 0; i < kIdsAtOnce; ++i) {
                if (begin_k + i < num_topk) {
                    visit(begin_k + i, ids[i], name(first_counter, ids[i]));
                }
            }
        }
    }

    /// All lanes of the warp: sets the bits of a batch in the masks, which this zeroes.
    DEEPCOMM_DEVICE WalkedToken mark(int32_t first_token, uint32_t* masks,
                                     int32_t num_counters) const {
        const device::Warp warp;
        for (int32_t i = warp.thread_idx(); i < num_counters; i += warp.size()) masks[i] = 0;
        warp.sync();  // ORDER: the zeros before the bits
        WalkedToken walked = {token_of(first_token), 0, 0};
        const uint32_t bit = 1u << warp.thread_idx();
        if (walked.token >= 0) {
            for_each_pair(walked.token, [&](int32_t k, int64_t id, const Pair& pair) {
                if (pair.expert < 0) {
                    if (id != -1) walked.refusal |= kExpertOutOfRange;
                    return;
                }
                const uint32_t pairs =
                    device::atom_or_relaxed_block(&masks[pair.pair_counter], bit);
                if ((pairs & bit) != 0) walked.refusal |= kExpertTwice;
                const uint32_t tokens =
                    device::atom_or_relaxed_block(&masks[pair.token_counter], bit);
                if ((tokens & bit) == 0) walked.firsts |= 1u << k;
            });
        }
        warp.sync();  // ORDER: the bits before they are counted
        return walked;
    }
};

/// Set bits of lanes before this one.
DEEPCOMM_DEVICE int32_t num_before(uint32_t mask) {
    return device::popcount(mask & ((1u << device::Warp{}.thread_idx()) - 1));
}

/// All lanes of the warp: adds a batch to the warp's counters, which other lanes may read after the
/// next mark.
DEEPCOMM_DEVICE void add_marks(const uint32_t* masks, uint32_t* counters, int32_t num_counters) {
    const device::Warp warp;
    for (int32_t i = warp.thread_idx(); i < num_counters; i += warp.size()) {
        counters[i] += static_cast<uint32_t>(device::popcount(masks[i]));
    }
}

}  // namespace deepcomm::kernels
