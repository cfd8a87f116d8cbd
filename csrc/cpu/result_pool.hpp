// SPDX-License-Identifier: Apache-2.0
// Ordinary memory for results, handed out again once a result is gone: memory that is fresh from the
// system costs a page fault every 4 KiB, more than the sums that are written to it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace deepcomm::cpu {

class ResultPool : public std::enable_shared_from_this<ResultPool> {
  public:
    /// Keeps at most max_idle_bytes that no result uses.
    explicit ResultPool(int64_t max_idle_bytes);
    ~ResultPool();
    ResultPool(const ResultPool&) = delete;
    ResultPool& operator=(const ResultPool&) = delete;

    /// Returns num_bytes > 0 of undefined content; they come back with the last reference, from any
    /// thread, and may outlive the pool's owner. Throws std::bad_alloc.
    std::shared_ptr<std::byte> take(int64_t num_bytes);
    /// Frees what is idle; what comes back from now on is freed at once. Idempotent.
    void close();
    int64_t idle_bytes() const;
    int64_t max_idle_bytes() const { return max_idle_bytes_; }

  private:
    struct Block {
        std::byte* data;
        int64_t num_bytes;
        uint64_t returned_at;  ///< num_taken_ when it came back

        static Block map(int64_t num_bytes);
        void unmap() const;
    };

    bool take_idle(int64_t num_bytes, Block& block);
    void give_back(Block block);
    void drop_oldest();

    const int64_t max_idle_bytes_;
    const int32_t pid_;  ///< of the process that constructed it
    mutable std::mutex mutex_;
    std::vector<Block> idle_;  ///< the longest idle first
    int64_t idle_bytes_ = 0;
    uint64_t num_taken_ = 0;
    bool closed_ = false;
};

}  // namespace deepcomm::cpu
