// SPDX-License-Identifier: Apache-2.0
// Arguments of the combine kernel.
#pragma once

#include "common/types.hpp"
#include "kernels/dispatch/params.hpp"
#include "kernels/meet/params.hpp"

namespace deepcomm::kernels {

/// Rows to bring back, BF16, in the layout of the dispatch.
struct ExpertOutputs {
    const unsigned char* rows;
    int64_t row_stride;  ///< bytes
    /// Between nodes: [own tokens, H], in the place of this rank's rows; so is `carried`, [own tokens, K].
    const float* own_sums;
    const int32_t* row_slots;  ///< expert layouts: [rows in TOKEN order, K]
    const float* row_weights;  ///< likewise: what peers' rows are multiplied by, or null
    const float* carried;      ///< to bring back: [rows, K] (TOKEN) or one a row, or null
};

/// What the tokens' rank gets; inside a node, what this rank keeps of its own tokens.
struct CombineTarget {
    unsigned char* out;         ///< [T, H] BF16, dense; null inside a node
    float* own_sums;            ///< inside a node: [own tokens, H]
    const unsigned char* bias;  ///< or null
    int64_t bias_stride;        ///< bytes
    float* topk_weights;        ///< [T, K]: what was carried, or null
};

/// Inside a node: where sums of other nodes' tokens go, for the ranks of the rail to add them up.
struct RailTarget {
    CommParams
        comm;  ///< of the rail, whose ranks are origins; peers' bases may be those of mirrors
    layout::ExchangeLayout layout;
    layout::RowAreas there;
    const int32_t* plan;  ///< of the rail's dispatch: layout::PlanLayout of one origin
    Counters* counters;
};

/// combine_open: the ranks of a rail meet before any of their nodes begins to sum.
struct CombineOpenParams {
    MeetParams meet;
    const int32_t* rail_made;  ///< PlanLayout::made of the handle's plans
    const int32_t* node_made;
    int32_t num_tokens;
};

struct CombineParams {
    MeetParams meet;
    RoutingTable table;
    ExpertOutputs outputs;
    CombineTarget target;
    RailTarget rail;            ///< inside a node
    const float* topk_weights;  ///< [T, K]: what this rank's own rows are multiplied by, or null
    int32_t num_tokens;         ///< with one origin; else the plan knows
    int32_t num_topk;
};

}  // namespace deepcomm::kernels
