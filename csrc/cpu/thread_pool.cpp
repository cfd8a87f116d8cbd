// SPDX-License-Identifier: Apache-2.0
#include "cpu/thread_pool.hpp"

#include <algorithm>

#include "common/math.hpp"

namespace deepcomm::cpu {

ThreadPool::ThreadPool(int32_t num_threads) {
    for (int32_t index = 1; index < num_threads; ++index) {
        workers_.emplace_back([this, index] { work(index); });
    }
}

ThreadPool::~ThreadPool() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        stopping_ = true;
    }
    start_.notify_all();
    for (std::thread& worker : workers_) {
        worker.join();
    }
}

void ThreadPool::parallel_for(int64_t count, int64_t grain,
                              const std::function<void(int64_t, int64_t)>& body) {
    const int64_t parts = std::min<int64_t>(num_threads(), ceil_div(count, grain));
    if (parts <= 1) {
        if (count > 0) {
            body(0, count);
        }
        return;
    }
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        num_parts_ = static_cast<int32_t>(parts);
        count_ = count;
        body_ = &body;
        num_running_ = static_cast<int32_t>(workers_.size());
        ++round_;
    }
    start_.notify_all();
    run_part(0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return num_running_ == 0; });
}

void ThreadPool::run_part(int32_t index) {
    if (index < num_parts_) {
        const int64_t begin = count_ * index / num_parts_;
        const int64_t end = count_ * (index + 1) / num_parts_;
        (*body_)(begin, end);
    }
}

void ThreadPool::work(int32_t index) {
    uint64_t seen = 0;
    while (true) {
        {
            std::unique_lock<std::mutex> lock(mutex_);
            start_.wait(lock, [&] { return stopping_ || round_ != seen; });
            if (stopping_) {
                return;
            }
            seen = round_;
        }
        run_part(index);
        const std::lock_guard<std::mutex> lock(mutex_);
        if (--num_running_ == 0) {
            done_.notify_one();
        }
    }
}

}  // namespace deepcomm::cpu
