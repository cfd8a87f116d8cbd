// SPDX-License-Identifier: Apache-2.0
// Vector clocks, shared until written: after a barrier a whole block holds one of them, and clocks
// that differ share the chunks in which they agree, so that a join looks at the others only.
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
        const size_t at = index / kChunkEntries;
        if (!node_ || at >= node_->chunks.size() || !node_->chunks[at]) return 0;
        return node_->chunks[at]->epochs[index % kChunkEntries];
    }
    bool is_zero() const { return node_ == nullptr; }
    bool shares_with(const Clock& other) const { return node_ == other.node_; }

    /// Lifts one entry to at least epoch.
    void raise(size_t index, uint32_t epoch);
    /// Lifts every entry to at least the other's.
    void join(const Clock& other);

  private:
    // Small enough that the threads of one warp dirty one or two, and that 4,000 threads have few.
    static constexpr size_t kChunkEntries = 128;

    struct Chunk {
        uint32_t num_owners;
        uint32_t epochs[kChunkEntries];
    };
    struct Node {
        uint32_t num_owners;
        std::vector<Chunk*> chunks;  ///< null: all zeros
    };
    struct Pool {
        std::vector<Node*> nodes;
        std::vector<Chunk*> chunks;
    };

    void release();
    std::vector<Chunk*>& writable_chunks(size_t min_size);
    uint32_t* writable_epochs(size_t chunk_idx);
    void join_chunk(size_t chunk_idx, Chunk* other);
    void replace_chunk(size_t chunk_idx, Chunk* chunk);
    static void release_chunk(Chunk* chunk);
    static Pool& pool();

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
