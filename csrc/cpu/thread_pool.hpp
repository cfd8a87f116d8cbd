// SPDX-License-Identifier: Apache-2.0
// Threads of one rank for copies, casts and sums. The calling thread is one of them.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace deepcomm::cpu {

class ThreadPool {
  public:
    /// num_threads counts the caller: 1 starts none.
    explicit ThreadPool(int32_t num_threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int32_t num_threads() const { return static_cast<int32_t>(workers_.size()) + 1; }

    /// Runs body(begin, end) over parts of [0, count) and returns when all are done. Parts are at
    /// least grain long; body must not throw.
    void parallel_for(int64_t count, int64_t grain,
                      const std::function<void(int64_t, int64_t)>& body);

  private:
    void work(int32_t index);
    void run_part(int32_t index);

    std::mutex mutex_;
    std::condition_variable start_;
    std::condition_variable done_;
    uint64_t round_ = 0;
    int32_t num_running_ = 0;
    bool stopping_ = false;
    int32_t num_parts_ = 0;
    int64_t count_ = 0;
    const std::function<void(int64_t, int64_t)>* body_ = nullptr;
    std::vector<std::thread> workers_;
};

}  // namespace deepcomm::cpu
