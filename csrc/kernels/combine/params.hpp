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
    int64_t row_stride;        ///< bytes
    const float* own_sums;     ///< between nodes: [own tokens, H], in the place of this rank's rows
    const int32_t* row_slots;  ///< expert layouts: [rows in TOKEN order, K]
    const float* row_weights;  ///< likewise: what peers' rows are multiplied by, or null
    const float* carried;      ///< to bring back: [rows, K] (TOKEN) or one a row, or null
};

/// What the tokens' rank gets.
struct CombineTarget {
    unsigned char* out;         ///< [T, H] BF16, dense
    float* own_sums;            ///< inside a node: [own tokens, H], in the place of their rows
    const unsigned char* bias;  ///< or null
    int64_t bias_stride;        ///< bytes
    float* topk_weights;        ///< [T, K]: what was carried, or null
};

struct CombineParams {
    MeetParams meet;
    RoutingTable table;
    ExpertOutputs outputs;
    CombineTarget target;
    const float* topk_weights;  ///< [T, K]: what this rank's own rows are multiplied by, or null
    int32_t own_origin;         ///< inside a node: whose tokens are those of this rank
    int32_t num_tokens;         ///< with one origin; else the plan knows
    int32_t num_topk;
};

}  // namespace deepcomm::kernels
