// SPDX-License-Identifier: Apache-2.0
// The sums of combine, in the one order that every backend keeps: experts of a rank, ranks of a
// node, nodes, bias. Used by both modes; where the rows lie is the caller's RowSource.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/dispatch.hpp"

namespace deepcomm::cpu {

/// Finds the row that a rank of this node returned for one of a source's tokens.
class RowSource {
  public:
    virtual ~RowSource() = default;
    /// Null where the rank is absent (masked).
    virtual const std::byte* row(const Destination& at) const = 0;
    /// Carried weights [K] of that row, or null.
    virtual const float* weights(const Destination& at) const = 0;
};

/// Partial sums that arrived from other nodes: records in the order of routing.node_tokens.
struct NodePartials {
    layout::TokenRecord format;
    std::vector<const std::byte*> records;  ///< [N], null for this node and absent ones
};

struct CombineTarget {
    std::byte* out = nullptr;  ///< [T, H] contiguous
    const std::byte* bias = nullptr;
    int64_t bias_stride = 0;
    float* topk_weights = nullptr;  ///< [T, K] or null
    bool carries_weights = false;
};

/// Consecutive tokens.
struct TokenRange {
    int64_t begin;
    int64_t end;
};

/// What is to be summed for a routing's tokens.
struct SumInputs {
    const DispatchRecord& record;
    const RowFormat& format;
    const RowSource& source;  ///< rows of this node
    NodePartials partials;    ///< sums of the others
};

/// Sums for each token of range what its ranks returned, into target.
void sum_tokens(Endpoint& endpoint, const SumInputs& inputs, const CombineTarget& target,
                TokenRange range);

/// Sums range of routing.node_tokens[this node] over this node into records.
void sum_node(Endpoint& endpoint, const Routing& routing, const RowFormat& format,
              const RowSource& source, TokenRange range, std::byte* records);

/// The expert outputs of this rank.
struct ExpertOutputs {
    const std::byte* y = nullptr;
    int64_t row_stride = 0;  ///< bytes
    const float* topk_weights =
        nullptr;  ///< carried: [N, K] for TOKEN, one a row otherwise; or null
    const float* apply_weights = nullptr;  ///< [N, K], multiplied (expert layouts); or null
};

/// One returned row: where its sum over this rank's experts and its carried weights go.
struct ReturnedRow {
    std::byte* row;  ///< null: only the weights
    float* weights;  ///< [K] or null
};

/// The rows this rank returns for what it received.
struct ReturnedRows {
    const RowFormat& format;
    RecvLayout recv_layout;
    const Received& received;
    const ExpertOutputs& outputs;
    const RowOps& ops;

    /// Sums row over this rank's experts (TOKEN: copies it) and collects its weights; stream: past
    /// the caches.
    void write(int64_t row, const ReturnedRow& target, bool stream) const;
};

}  // namespace deepcomm::cpu
