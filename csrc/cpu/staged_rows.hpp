// SPDX-License-Identifier: Apache-2.0
// Rows of combine where the ranks of this node announced them.
#pragma once

#include <vector>

#include "cpu/round.hpp"
#include "cpu/sum.hpp"

namespace deepcomm::cpu {

class StagedRows : public RowSource {
  public:
    StagedRows(const Endpoint& endpoint, const Round& round, int64_t row_bytes, int32_t num_topk);

    const std::byte* row(const Destination& at) const override {
        return rows_[static_cast<size_t>(config_.local_of(at.rank))] + at.slot * row_bytes_;
    }
    const float* weights(const Destination& at) const override {
        return weights_[static_cast<size_t>(config_.local_of(at.rank))] +
               static_cast<int64_t>(at.slot) * num_topk_;
    }

  private:
    int64_t row_bytes_;
    int32_t num_topk_;
    const EndpointConfig& config_;
    std::vector<const std::byte*> rows_;
    std::vector<const float*> weights_;
};

}  // namespace deepcomm::cpu
