// SPDX-License-Identifier: Apache-2.0
// Arguments of the dispatch kernels.
#pragma once

#include "common/types.hpp"
#include "kernels/meet/params.hpp"

namespace deepcomm::kernels {

/// What the host waits for where it must know how many rows arrive.
struct CountReport {
    uint64_t tag;  ///< last; the host's number of the operation
    int32_t num_rows;
    int32_t num_recv;
    int32_t status;      ///< MeetStatus
    int32_t num_tokens;  ///< rows in TOKEN order
};

/// A rank's routing: what was given, and the slots that follow from it. Owned by the handle.
struct RoutingTable {
    int32_t* topk_idx;    ///< [T, K]
    int32_t* token_slot;  ///< [T, K]: row of the token at the rank of expert k in TOKEN order; -1
                          ///< where an earlier k has named the rank already, or there is no expert
    int32_t* pair_slot;   ///< [T, K]: row of the pair at that rank in an expert layout, or -1
    int32_t* plan;        ///< layout::PlanLayout
    float* topk_weights;  ///< [T, K]: copy of what was given, or null
};

/// dispatch_count: who sends how much where, and the slot of every row.
struct CountParams {
    MeetParams meet;
    RoutingTable table;
    const void* topk_idx;  ///< as given: [num_tokens, num_topk]
    int32_t ids_are_64;
    /// [O + 1]: first token of each origin, and how many there are; null with one origin.
    const int32_t* tokens_from;
    int32_t num_tokens;  ///< with one origin
    int32_t num_topk;
    RecvLayout recv_layout;
    uint64_t* partials;  ///< [blocks, O * (R + E) + 1]: {epoch, count of the block}
    int32_t* counts;     ///< out: [L], delivered pairs of each local expert
    int32_t* offsets;    ///< out: [L + 1], or null
    int32_t* num_recv;   ///< out: rows delivered
    uint32_t* overflow;  ///< out: 1 if rows were lost, else 0; with one origin also if its were
    uint32_t* lost;      ///< out, with several origins: [O], 1 if tokens of theirs were lost
    CountReport* report;
    uint64_t report_tag;
};

/// With several nodes: what a rank that sends tokens on shares with its rail.
struct RailSide {
    CommParams comm;
    layout::ExchangeLayout layout;
    const uint32_t* lost;    ///< [O], of dispatch_count; null: nobody is told of lost tokens
    uint32_t* overflow;      ///< set if tokens of this rank were lost
    const uint64_t* landed;  ///< [O]: {rows of the origin that are here, epoch}; null: all are
    int32_t part_rows;       ///< of an origin, that come together: whole chunks
};

/// Rows as they are given.
struct RowSource {
    const unsigned char* rows;
    const unsigned char* scales;  ///< or null
    int64_t row_stride;           ///< bytes
    int64_t scale_stride;
};

/// Where an expert layout is delivered: ordinary memory of this rank.
struct ExpertTarget {
    unsigned char* rows;
    uint32_t* scales;     ///< [rows, scale words], for dispatch_scales to turn round; or null
    float* topk_weights;  ///< one a row, zeroed, or null
    int32_t* row_slots;   ///< [rows in TOKEN order, K]: for the handle
    float* row_weights;   ///< likewise, or null
};

/// dispatch_send: rows to their places; then, in the expert layouts, from where they landed to the
/// slots of their experts.
struct SendParams {
    MeetParams meet;
    RoutingTable table;
    RowSource source;
    const float* topk_weights;  ///< [T, K] or null
    ExpertTarget target;        ///< expert layouts only
    RailSide rail;
    void* round;          ///< device::EpochState of arrivals
    int32_t* counts;      ///< [L] to be corrected where TOKEN rows overflow
    int32_t num_origins;  ///< of the plan
    int32_t num_tokens;   ///< with one origin; else the plan knows
    int32_t num_topk;
    int32_t opens;  ///< whether this kernel holds the meeting (cached dispatch)
    int32_t zero_padding;
    int32_t scale_words;  ///< 32-bit words of scales a row, 0 without
    int32_t scales_are_ue8m0;
};

/// dispatch_scales: scales of the expert layouts, from rows to columns.
struct ScaleParams {
    const uint32_t* rows;      ///< [blocks, block_rows, scale_words]
    uint32_t* columns;         ///< [blocks, scale_words, column_words]
    const int32_t* used_rows;  ///< [blocks]: rows to turn, the first ones of each block
    int32_t num_blocks;
    int32_t block_rows;
    int32_t column_words;  ///< a block's rows, rounded up
    int32_t scale_words;
};

}  // namespace deepcomm::kernels
