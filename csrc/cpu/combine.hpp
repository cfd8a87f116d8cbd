// SPDX-License-Identifier: Apache-2.0
// High-throughput combine on CPUs. A rank's rows reach the ranks that sum them in one of three ways:
//   lent    y is the view of symmetric memory that dispatch returned: peers read it where it lies;
//   ring    one node, any other tensor: rows pass block by block through a small ring that stays in
//           the cache the cores share (combine_ring.hpp);
//   staged  several nodes: all rows are copied to a generation, because sums for other nodes go first.
// Sums for tokens of other nodes go back over the rail, one per (token, node).
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

    /// Makes the rows readable, or ready to pass through the ring, and announces them.
    void stage();
    Round& round() { return *round_; }

    int64_t record_bytes() const;
    int64_t num_rows_to(int32_t source) const;  ///< partial sums this rank sends to a rail peer
    int64_t num_rows_from(int32_t node) const;  ///< partial sums it gets from one
    void pack(int32_t source, int64_t begin, int64_t end, std::byte* records);
    /// Sums; partials[n] holds the records of node n (null for this node).
    void finish(const std::vector<const std::byte*>& partials);

  private:
    enum class Way { kLent, kRing, kStaged };

    Way choose_way(int32_t lent_generation) const;
    int32_t choose_generation(int32_t lent_generation);
    void stage_rows(int32_t generation);
    const Routing& forwarded(int32_t source) const;
    void count_bytes();

    Endpoint& endpoint_;
    CombineArgs args_;
    std::unique_ptr<Round> round_;
    Way way_ = Way::kStaged;
    int64_t rows_offset_ = 0;
};

}  // namespace deepcomm::cpu
