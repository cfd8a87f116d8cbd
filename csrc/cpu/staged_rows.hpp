// SPDX-License-Identifier: Apache-2.0
// Rows of combine where the ranks of this node announced them.
#pragma once

#include <vector>

#include "cpu/round.hpp"
#include "cpu/sum.hpp"

namespace deepcomm::cpu {

class StagedRows : public RowSource {
  public:
    /// Rows of TOKEN layout beyond capacity (-1: none) were lost, and are not there.
    StagedRows(const Endpoint& endpoint, const Round& round, int64_t row_bytes,
               const DispatchRecord& record);

    const std::byte* row(const Destination& at) const override {
        if (at.slot >= num_slots_) {
            return nullptr;
        }
        return rows_[static_cast<size_t>(config_.local_of(at.rank))] + at.slot * row_bytes_;
    }
    const float* weights(const Destination& at) const override {
        return weights_[static_cast<size_t>(config_.local_of(at.rank))] +
               static_cast<int64_t>(at.slot) * num_topk_;
    }

  private:
    int64_t row_bytes_;
    int32_t num_topk_;
    int64_t num_slots_;
    const EndpointConfig& config_;
    std::vector<const std::byte*> rows_;
    std::vector<const float*> weights_;
};

}  // namespace deepcomm::cpu
