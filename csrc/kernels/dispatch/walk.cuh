// SPDX-License-Identifier: Apache-2.0
// A warp's walk over the routing of consecutive tokens, a lane a (token, k) pair. Counting and slot
// assignment take the same walk, so that both see the same order: tokens ascending.
#pragma once

#include "device/device.cuh"
#include "kernels/dispatch/params.hpp"

namespace deepcomm::kernels {

/// One lane's pair and the lanes that share something with it.
struct Pair {
    int32_t index;          ///< in [T, K], or -1: none
    int32_t expert;         ///< or -1
    int32_t dst;            ///< rank of the expert, or -1
    int32_t token_counter;  ///< which one counts the token for that rank, or -1
    int32_t pair_counter;   ///< which one counts the pair, or -1
    uint32_t same_expert;   ///< lanes with the same pair_counter
    uint32_t firsts;        ///< lanes with the same token_counter that are first of their tokens
    bool is_first;
    uint32_t refusal;
};

struct Walk {
    static constexpr int64_t kInactive = -0x7FFFFFFFFFFFFFFF - 1;  ///< the id of lanes without pair

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

    DEEPCOMM_DEVICE int32_t tokens_per_step() const { return device::kWarpSize / num_topk; }

    DEEPCOMM_DEVICE int64_t id_at(int32_t index) const {
        return ids_are_64 ? static_cast<const int64_t*>(topk_idx)[index]
                          : static_cast<const int32_t*>(topk_idx)[index];
    }

    /// The id of this lane's pair in a step that begins with a token; loaded a step ahead, so that
    /// nobody waits for memory.
    DEEPCOMM_DEVICE int64_t load(int32_t first_token) const {
        const int32_t lane = device::Warp{}.thread_idx();
        const int32_t token_in_step = lane / num_topk;
        const bool is_active =
            token_in_step < tokens_per_step() && first_token + token_in_step < end;
        return is_active ? id_at(first_token * num_topk + lane) : kInactive;
    }

    /// Counters of an origin are [R] tokens for each rank, then [E] pairs for each expert.
    DEEPCOMM_DEVICE void name_counters(int32_t token, Pair* pair) const {
        const int32_t num_ranks = num_experts / num_local_experts;
        int32_t first = 0;
        for (int32_t origin = 1; origin < num_origins; ++origin) {
            if (token >= tokens_from[origin]) first = origin * (num_ranks + num_experts);
        }
        pair->token_counter = (splits_ranks ? first : 0) + pair->dst;
        pair->pair_counter = first + num_ranks + pair->expert;
    }

    /// All lanes of the warp; id is what load has returned for the same token.
    DEEPCOMM_DEVICE Pair at(int32_t first_token, int64_t id) const {
        const int32_t lane = device::Warp{}.thread_idx();
        const int32_t token_in_step = lane / num_topk;
        const bool is_active = id != kInactive;
        Pair pair = {
            is_active ? first_token * num_topk + lane : -1, -1, -1, -1, -1, 0, 0, false, 0};
        if (is_active) {
            const bool is_expert = id >= 0 && id < num_experts;
            if (!is_expert && id != -1) pair.refusal = kExpertOutOfRange;
            pair.expert = is_expert ? static_cast<int32_t>(id) : -1;
            pair.dst = is_expert ? pair.expert / num_local_experts : -1;
            if (is_expert) name_counters(first_token + token_in_step, &pair);
        }
        const uint32_t own_token = (~0u >> (device::kWarpSize - num_topk))
                                   << (token_in_step * num_topk % device::kWarpSize);
        const auto nobody = static_cast<uint32_t>(-1 - lane);  // alike in no two lanes
        const bool has_expert = pair.expert >= 0;
        pair.same_expert =
            device::warp_match(has_expert ? static_cast<uint32_t>(pair.pair_counter) : nobody);
        const uint32_t same_dst =
            device::warp_match(has_expert ? static_cast<uint32_t>(pair.token_counter) : nobody);
        pair.is_first = has_expert && device::lowest_bit(same_dst & own_token) == lane;
        pair.firsts = device::warp_ballot(pair.is_first) & same_dst;
        if (has_expert && device::popcount(pair.same_expert & own_token) > 1) {
            pair.refusal = kExpertTwice;
        }
        return pair;
    }
};

/// Lanes of the mask before this one.
DEEPCOMM_DEVICE int32_t num_before(uint32_t mask) {
    const int32_t lane = device::Warp{}.thread_idx();
    return device::popcount(mask & ((1u << lane) - 1));
}

/// Adds a step's pairs to the warp's counters.
DEEPCOMM_DEVICE void add_to_counters(const Pair& pair, uint32_t* counters) {
    const device::Warp warp;
    const int32_t lane = warp.thread_idx();
    if (pair.is_first && device::lowest_bit(pair.firsts) == lane) {
        counters[pair.token_counter] += static_cast<uint32_t>(device::popcount(pair.firsts));
    }
    if (pair.expert >= 0 && device::lowest_bit(pair.same_expert) == lane) {
        counters[pair.pair_counter] += static_cast<uint32_t>(device::popcount(pair.same_expert));
    }
    warp.sync();  // ORDER: the counters before the lanes that read them in the next step
}

}  // namespace deepcomm::kernels
