// SPDX-License-Identifier: Apache-2.0
// What a rank keeps of one routing besides its slots: int32 words in device memory, owned by the
// handle. S sources and D destinations are all R ranks.
//
//   rows_from[R + 1] | push_base[R] | sent_base[R] | combine_base[R] | capacity[R]
//
// rows_from[s]: first row of source s here in TOKEN order (exclusive prefix sums of the counts).
// push_base[s]: first row of this rank's block in the combine region of source s.
// sent_base[d]: first row of this rank's tokens at d in TOKEN order.
// combine_base[d]: first row of d's block in this rank's combine region; blocks of peers only.
// capacity[d]: rows that fit at d, in the layout asked for; the largest int32 where all do.
#pragma once

#include "common/int.hpp"

namespace deepcomm::layout {

struct PlanLayout {
    int32_t num_ranks;

    constexpr int32_t rows_from() const { return 0; }
    constexpr int32_t push_base() const { return num_ranks + 1; }
    constexpr int32_t sent_base() const { return push_base() + num_ranks; }
    constexpr int32_t combine_base() const { return sent_base() + num_ranks; }
    constexpr int32_t capacity() const { return combine_base() + num_ranks; }
    constexpr int32_t num_words() const { return capacity() + num_ranks; }
};

static_assert(PlanLayout{2}.num_words() == 11, "drawing above");

}  // namespace deepcomm::layout
