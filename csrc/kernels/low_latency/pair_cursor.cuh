// SPDX-License-Identifier: Apache-2.0
// A block's way through what there is of all ranks, in the same order on all of them.
#pragma once

#include "kernels/low_latency/params.hpp"

namespace deepcomm::kernels::low_latency {

/// Tokens of the source that has most of them.
template <typename Shared>
DEEPCOMM_DEVICE int32_t most_tokens(const LowLatencyParams& params, const Shared& shared) {
    int32_t most = 0;
    DEEPCOMM_NO_UNROLL
    for (int32_t source = 0; source < params.map.num_ranks; ++source) {
        most = shared.num_tokens[source] > most ? shared.num_tokens[source] : most;
    }
    return most;
}

/// Items of a rank after those of another, the first rank's first; a block takes those from its index on that are
/// num_blocks apart. Without divisions, which rows would wait for.
struct PairCursor {
    int32_t most;  ///< items of each rank
    int32_t item;  ///< of the rank it has come to, if less than that; at first the block's index
    int32_t num_passed = 0;  ///< ranks

    /// Whether there is an item still.
    DEEPCOMM_DEVICE bool find(const LowLatencyParams& params) {
        DEEPCOMM_NO_UNROLL
        for (; item >= most && num_passed < params.map.num_ranks; ++num_passed) item -= most;
        return num_passed < params.map.num_ranks;
    }

    /// Its rank; first: the one to begin with, up to num_ranks.
    DEEPCOMM_DEVICE int32_t rank(const LowLatencyParams& params, int32_t first) const {
        const int32_t rank = first + num_passed;
        return rank < params.map.num_ranks ? rank : rank - params.map.num_ranks;
    }
};

}  // namespace deepcomm::kernels::low_latency
