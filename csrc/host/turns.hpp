// SPDX-License-Identifier: Apache-2.0
// Operations that take the slots of a buffer in turn, as its host counts them: kernels do so themselves.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>

namespace deepcomm::host {

/// Operations so far; replays of a graph are not seen.
struct OperationCounts {
    int64_t num_dispatches = 0;
    int64_t num_combines = 0;
    int64_t tokens_sent = 0;  ///< given to these dispatches
};

class Turns {
  public:
    explicit Turns(int64_t num_slots) : num_slots_(num_slots) {}

    /// Whether the slot of the next operation is no longer that of one which waits for its hook.
    bool has_free_slot() const {
        return in_flight_.empty() || in_flight_.front() > num_opened_ - num_slots_;
    }

    int64_t next_slot() const { return num_opened_ % num_slots_; }

    /// Begins an operation and returns its number.
    int64_t open() { return num_opened_++; }

    /// Until its hook is called; operations are left in their order.
    void leave_in_flight(int64_t number) { in_flight_.push_back(number); }

    void settle(int64_t number) {
        in_flight_.erase(std::remove(in_flight_.begin(), in_flight_.end(), number),
                         in_flight_.end());
    }

    size_t num_in_flight() const { return in_flight_.size(); }

  private:
    int64_t num_slots_;
    int64_t num_opened_ = 0;
    std::deque<int64_t> in_flight_;
};

}  // namespace deepcomm::host
