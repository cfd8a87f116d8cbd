// SPDX-License-Identifier: Apache-2.0
// What a rank keeps of one routing besides its slots: int32 words in device memory, owned by the
// handle. R ranks; O origins: the nodes whose tokens a rank sends on, one where it sends its own.
// Tokens that rank s has of origin o are block o * R + s; so are, at their source, those for rank d
// block o * R + d. Blocks in this order are ranks in order: a rank's blocks of its rail.
//
//   rows_from[O * R + 1] | push_base[O * R] | sent_base[O * R] | combine_base[O * R] | capacity[R]
//   | tokens_from[O + 1] | made
//
// rows_from[b]: first row of block b here in TOKEN order (exclusive prefix sums of the counts).
// push_base[b]: first row of block b in the combine region of its source.
// sent_base[b]: first row of this rank's block b at its destination, in TOKEN order.
// combine_base[b]: first row of block b in this rank's combine region; blocks of peers only.
// capacity[d]: rows that fit at d, in the layout asked for; the largest int32 where all do.
// tokens_from[o]: first token of origin o on this rank, and the number of tokens.
// made: 1 once all of it is written, and the slots are; 0 from the begin of a dispatch on, and for good
// if that does not take place.
//
// In the expert layouts rows of all origins make one block a rank, that of origin 0: what lands
// there is looked up by slot, so that its own order is nobody's concern.
#pragma once

#include "common/int.hpp"

namespace deepcomm::layout {

struct PlanLayout {
    int32_t num_ranks;
    int32_t num_origins;

    constexpr int32_t num_blocks() const { return num_origins * num_ranks; }
    constexpr int32_t rows_from() const { return 0; }
    constexpr int32_t push_base() const { return num_blocks() + 1; }
    constexpr int32_t sent_base() const { return push_base() + num_blocks(); }
    constexpr int32_t combine_base() const { return sent_base() + num_blocks(); }
    constexpr int32_t capacity() const { return combine_base() + num_blocks(); }
    constexpr int32_t tokens_from() const { return capacity() + num_ranks; }
    constexpr int32_t made() const { return tokens_from() + num_origins + 1; }
    constexpr int32_t num_words() const { return made() + 1; }
};

static_assert(PlanLayout{2, 1}.capacity() == 9, "drawing above");
static_assert(PlanLayout{2, 1}.made() == 13, "drawing above");
static_assert(PlanLayout{2, 3}.num_words() == 32, "drawing above");

}  // namespace deepcomm::layout
