// SPDX-License-Identifier: Apache-2.0
// What crosses a carried rail beside rows: the words that one rank has for one peer, in its outbox, and
// those that the peer has for it, in its inbox. PROTOCOLS.md: carried rails.
//
//   header: 2 packets | counts[C]: {value low, epoch high} | lost: likewise | ready
//
// C counters of ExchangeShape. Everything in it says by its epoch whether it is of the operation at hand;
// ready says that what comes with it is what the step is for (kernels::ready_tag).
#pragma once

#include "layout/exchange.hpp"

namespace deepcomm::layout {

struct RailWords {
    int32_t num_counters;

    constexpr int64_t header() const { return 0; }
    constexpr int64_t counts() const { return 2 * kPacketBytes; }
    constexpr int64_t lost() const { return counts() + int64_t{8} * num_counters; }
    constexpr int64_t ready() const { return lost() + 8; }
    constexpr int64_t num_bytes() const { return round_up(ready() + 8, kPacketBytes); }
};

static_assert(RailWords{6}.lost() == 80 && RailWords{6}.num_bytes() == 96, "drawing above");
static_assert(RailWords{5}.ready() == 80 && RailWords{5}.num_bytes() == 96, "drawing above");

/// What the host is told of a meeting on a carried rail: the tag, then words.
struct RailReport {
    int32_t num_ranks;

    constexpr int64_t is_good() const { return 8; }   ///< whether rows will be exchanged
    constexpr int64_t rows_to() const { return 16; }  ///< int32 [R]: of this rank, for each
    constexpr int64_t rows_from() const { return rows_to() + 4 * num_ranks; }  ///< for this rank
    constexpr int64_t ids_are_64() const {
        return rows_from() + 4 * num_ranks;
    }  ///< wanted by each
    constexpr int64_t num_bytes() const { return ids_are_64() + 4 * num_ranks; }
};

}  // namespace deepcomm::layout
