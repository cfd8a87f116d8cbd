// SPDX-License-Identifier: Apache-2.0
// The combine ring of one node: rows pass from the ranks that computed them to the ranks that sum
// them in blocks of tokens, through memory small enough to stay in a shared cache. Block b holds the
// rows of the tokens [b * B, (b + 1) * B) of every source.
//
//   rank d                                     rank s
//   copy block b to ring slot b % 3
//   staged = b + 1          --- release --->   wait staged of every d > b
//                                              sum its tokens of block b
//   wait consumed of        <-- release ----   consumed = b + 1
//   every s > b - 3, reuse
#pragma once

#include <vector>

#include "cpu/combine.hpp"

namespace deepcomm::cpu {

class CombineRing {
  public:
    CombineRing(Endpoint& endpoint, const Round& round, const CombineArgs& args);

    /// Whether any rank of the node passes its rows through the ring.
    bool is_used() const;
    /// Runs all blocks: stages this rank's rows and sums this rank's tokens.
    void run();

  private:
    class BlockRows;

    bool through_ring(int32_t local) const;
    void stage(int64_t block);
    void stage_for(int32_t source, int64_t block);
    void consume(int64_t block);
    /// Rows of source's tokens of block, in TOKEN order.
    TokenRange rows_of(int32_t source, int64_t block) const;
    std::byte* slot(int32_t local, int64_t block, int32_t for_local) const;

    Endpoint& endpoint_;
    const Round& round_;
    const CombineArgs& args_;
    int64_t block_tokens_;
    int64_t num_blocks_;
    bool own_in_place_;  ///< this rank reads its own rows from y
};

}  // namespace deepcomm::cpu
