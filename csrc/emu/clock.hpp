// SPDX-License-Identifier: Apache-2.0
// Vector clocks, shared until written: after a barrier a whole block holds one of them.
//
//   index   0 .. A-1             | A ..  threads and views, on demand
//   holds   asynchronous agents  | a thread      | a view, one a strong location
//   value   epoch seen           | epoch seen    | index of the oldest message still readable
//
// A missing entry is 0, and the null clock is all zeros, so clocks grow without being told to.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace deepcomm::emu {

class Clock {
  public:
    Clock() = default;
    Clock(const Clock& other) : node_(other.node_) {
        if (node_) ++node_->num_owners;
    }
    Clock(Clock&& other) noexcept : node_(std::exchange(other.node_, nullptr)) {}
    Clock& operator=(Clock other) noexcept {
        std::swap(node_, other.node_);
        return *this;
    }
    ~Clock() { release(); }

    uint32_t operator[](size_t index) const {
        return node_ && index < node_->epochs.size() ? node_->epochs[index] : 0;
    }
    bool is_zero() const { return node_ == nullptr; }
    bool shares_with(const Clock& other) const { return node_ == other.node_; }

    /// Lifts one entry to at least epoch.
    void raise(size_t index, uint32_t epoch);
    /// Lifts every entry to at least the other's.
    void join(const Clock& other);

  private:
    struct Node {
        uint32_t num_owners;
        std::vector<uint32_t> epochs;
    };

    void release();
    std::vector<uint32_t>& writable(size_t min_size);
    static Node* new_node();
    static std::vector<Node*>& free_nodes();

    Node* node_ = nullptr;
};

/// What an actor knows to have happened: at all, and with a proxy fence on the way, which is what
/// the asynchronous proxy sees of generic writes.
struct Knowledge {
    Clock seen;
    Clock proxied;

    void join(const Knowledge& other) {
        seen.join(other.seen);
        proxied.join(other.proxied);
    }
    bool is_zero() const { return seen.is_zero() && proxied.is_zero(); }
};

}  // namespace deepcomm::emu
