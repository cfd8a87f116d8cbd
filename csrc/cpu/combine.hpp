// SPDX-License-Identifier: Apache-2.0
// High-throughput combine on CPUs: each rank stages its rows (summed over its experts) where its
// node can read them, or lends the view it received them in; the tokens' ranks read and sum. Sums for
// tokens of other nodes go back over the rail, one per (token, node).
#pragma once

#include <memory>

#include "cpu/sum.hpp"

namespace deepcomm::cpu {

struct CombineArgs {
    ExpertOutputs outputs;
    RowFormat format;  ///< the wire dtype is y's
    bool apply_weights = false;
    CombineTarget target;
    std::shared_ptr<const DispatchRecord> record;
};

class CombineOp {
  public:
    CombineOp(Endpoint& endpoint, const CombineArgs& args);

    /// Stages the rows and announces them.
    void stage();
    Round& round() { return *round_; }

    int64_t record_bytes() const;
    int64_t num_rows_to(int32_t source) const;  ///< partial sums this rank sends to a rail peer
    int64_t num_rows_from(int32_t node) const;  ///< partial sums it gets from one
    void pack(int32_t source, int64_t begin, int64_t end, std::byte* records);
    /// Sums; partials[n] holds the records of node n (null for this node).
    void finish(const std::vector<const std::byte*>& partials);
    bool zero_copy() const { return zero_copy_; }

  private:
    void stage_rows(int32_t generation);
    const Routing& forwarded(int32_t source) const;

    Endpoint& endpoint_;
    CombineArgs args_;
    std::unique_ptr<Round> round_;
    bool zero_copy_ = false;
    int64_t rows_offset_ = 0;
};

}  // namespace deepcomm::cpu
