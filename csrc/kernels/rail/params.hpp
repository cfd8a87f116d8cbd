// SPDX-License-Identifier: Apache-2.0
// Arguments of the kernels around a network that carries a rail. PROTOCOLS.md: carried rails.
#pragma once

#include "kernels/meet/params.hpp"
#include "layout/rail.hpp"

namespace deepcomm::kernels {

/// What is carried in one go.
enum class RailStep : int32_t {
    kMeeting = 0,  ///< headers, and counts where there are some
    kRouting = 1,  ///< of a dispatch: all that goes beside its rows
    kRows = 2,     ///< of a dispatch: a part of them
    kPushed = 3,   ///< of a combine: a part of them
    kLost = 4,     ///< whether tokens were lost
};

/// What the kernels of one rank's rail remember, in zeroed device memory.
struct RailState {
    uint32_t num_arrivals;  ///< dispatches whose rows were carried
    uint32_t is_ready;      ///< whether the step at hand has something to carry
    uint32_t routed_epoch;  ///< of the latest dispatch whose mirrors were complete
};

/// What a rank tells a peer beside what it carries, where that means something: which step it is.
constexpr uint64_t ready_tag(uint32_t epoch, RailStep step, int32_t begin_row) {
    const auto low = static_cast<uint32_t>(begin_row) << 4 | static_cast<uint32_t>(step) << 1 | 1;
    return static_cast<uint64_t>(epoch) << 32 | low;
}

/// How far a rank's steps have come, for a host that looks now and then.
struct RailProgress {
    uint32_t num_gates;       ///< steps that have passed their gates
    uint32_t num_deliveries;  ///< steps that are through
};

struct RailParams {
    CommParams comm;  ///< the peers' bases are those of mirrors
    layout::ExchangeLayout layout;
    uint32_t epoch;  ///< of the operation
    RailStep step;
    const Verdict* verdict;  ///< of the stage that writes what is carried
    unsigned char* outbox;   ///< [R] layout::RailWords
    unsigned char* inbox;    ///< likewise
    RailState* state;
    RailProgress* progress;  ///< in memory shared with the host
    uint32_t number;         ///< of the step, from 1
    unsigned char* report;   ///< layout::RailReport
    int32_t has_counts;      ///< meeting
    int32_t max_tokens;      ///< meeting
    const int32_t* plan;     ///< pushed: layout::PlanLayout of one origin
    int32_t begin_row;       ///< rows, pushed: the part, of each peer's rows
    int32_t end_row;
    uint64_t* landed;  ///< rows: [R], {rows of the source that are here, epoch}
};

}  // namespace deepcomm::kernels
