// SPDX-License-Identifier: Apache-2.0
// What a move over NCCL's device API is made of. PROTOCOLS.md: moves over GIN.
//
//   GinSpan    0 window   8 offset   16 num_bytes                                     24 bytes
//   GinTable   0 number   8 num_spans   16 spans[10]                                 256 bytes
//   GinPeer    0 rank   4 num_sends   6 num_receives   8 num_puts   16 num_ready   24 num_data
//              32 sends[10]   272 receives[10]                                       512 bytes
//   control    outgoing[R]: GinTable | incoming[R]: GinTable
//
// The host writes a GinPeer for each peer of a move, in memory that both see. A GinTable is what a rank
// tells a peer: where the peer's bytes go. Both are read whole before the next one may be written.
#pragma once

#include "common/int.hpp"

namespace deepcomm::layout {

/// Spans between two ranks in one direction of one move that are not empty.
constexpr int32_t kMostGinSpans = 10;
/// Places in the list of windows: the first is that of the control words, the others are taken in turn,
/// alike on all ranks.
constexpr int32_t kMostGinWindows = 64;
/// Of one put: NCCL's proxy cuts larger ones into several operations.
constexpr int64_t kGinPutBytes = int64_t{1} << 30;

struct GinSpan {
    int64_t window;  ///< its place in the list
    int64_t offset;
    int64_t num_bytes;
};

struct GinTable {
    uint64_t number;  ///< of the moves that carried something this way, this one included
    int64_t num_spans;
    GinSpan spans[kMostGinSpans];
};

struct GinPeer {
    int32_t rank;
    int16_t num_sends;
    int16_t num_receives;
    uint64_t num_puts;   ///< to the peer in earlier moves, of tables and pieces of spans
    uint64_t num_ready;  ///< tables that have come from the peer once that of this move has
    uint64_t num_data;   ///< moves that have brought something from it once this one has
    GinSpan sends[kMostGinSpans];
    GinSpan receives[kMostGinSpans];
};

static_assert(sizeof(GinTable) == 256 && sizeof(GinPeer) == 512, "drawing above");

struct GinControl {
    int32_t num_ranks;

    constexpr int64_t outgoing(int32_t peer) const { return peer * int64_t{sizeof(GinTable)}; }
    constexpr int64_t incoming(int32_t peer) const { return outgoing(num_ranks + peer); }
    constexpr int64_t num_bytes() const { return outgoing(2 * num_ranks); }
};

static_assert(GinControl{2}.incoming(1) == 768 && GinControl{2}.num_bytes() == 1024,
              "drawing above");

}  // namespace deepcomm::layout
