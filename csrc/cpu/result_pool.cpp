// SPDX-License-Identifier: Apache-2.0
#include "cpu/result_pool.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <new>

#include "common/math.hpp"

namespace deepcomm::cpu {

namespace {

constexpr int64_t kPage = 4096;
constexpr int64_t kHugePage = 2 << 20;
/// A block from this size on begins and ends with a huge page: at most a quarter of it is filler.
constexpr int64_t kHugeBlock = 4 * kHugePage;
/// A block serves results of down to 1 - 1/4 of its size.
constexpr int64_t kSlackDivisor = 4;
/// An idle block that so many results have passed by is freed.
constexpr uint64_t kPatience = 64;

int64_t block_bytes(int64_t num_bytes) {
    return round_up(num_bytes, num_bytes >= kHugeBlock ? kHugePage : kPage);
}

}  // namespace

ResultPool::Block ResultPool::Block::map(int64_t num_bytes) {
    const int64_t align = num_bytes >= kHugeBlock ? kHugePage : kPage;
    const int64_t mapped = num_bytes + align - kPage;
    void* const address = mmap(nullptr, static_cast<size_t>(mapped), PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (address == MAP_FAILED) {
        throw std::bad_alloc();
    }
    auto* const begin = static_cast<std::byte*>(address);
    const int64_t head = round_up(static_cast<int64_t>(reinterpret_cast<uintptr_t>(begin)), align) -
                         static_cast<int64_t>(reinterpret_cast<uintptr_t>(begin));
    if (head > 0) {
        munmap(begin, static_cast<size_t>(head));
    }
    if (mapped > head + num_bytes) {
        munmap(begin + head + num_bytes, static_cast<size_t>(mapped - head - num_bytes));
    }
    if (align == kHugePage) {
        madvise(begin + head, static_cast<size_t>(num_bytes), MADV_HUGEPAGE);  // or small pages
    }
    return {begin + head, num_bytes, 0};
}

void ResultPool::Block::unmap() const { munmap(data, static_cast<size_t>(num_bytes)); }

ResultPool::ResultPool(int64_t max_idle_bytes) : max_idle_bytes_(max_idle_bytes), pid_(getpid()) {}

ResultPool::~ResultPool() {
    for (const Block& block : idle_) {
        block.unmap();
    }
}

std::shared_ptr<std::byte> ResultPool::take(int64_t num_bytes) {
    Block block{};
    if (!take_idle(num_bytes, block)) {
        block = Block::map(block_bytes(num_bytes));
    }
    return {block.data, [pool = shared_from_this(), block](std::byte*) { pool->give_back(block); }};
}

bool ResultPool::take_idle(int64_t num_bytes, Block& block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++num_taken_;
    auto best = idle_.end();
    for (auto found = idle_.begin(); found != idle_.end(); ++found) {
        const bool fits = found->num_bytes >= num_bytes &&
                          found->num_bytes - found->num_bytes / kSlackDivisor <= num_bytes;
        // Of equal ones the last to come back: it may still be in a cache.
        if (fits && (best == idle_.end() || found->num_bytes <= best->num_bytes)) {
            best = found;
        }
    }
    const bool taken = best != idle_.end();
    if (taken) {
        block = *best;
        idle_bytes_ -= block.num_bytes;
        idle_.erase(best);
    }
    while (!idle_.empty() && idle_.front().returned_at + kPatience < num_taken_) {
        drop_oldest();
    }
    return taken;
}

void ResultPool::give_back(Block block) {
    if (getpid() != pid_) {  // a forked child: the lock may have been held when it was made
        block.unmap();
        return;
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    if (closed_) {
        block.unmap();
        return;
    }
    block.returned_at = num_taken_;
    idle_bytes_ += block.num_bytes;
    idle_.push_back(block);
    while (idle_bytes_ > max_idle_bytes_) {
        drop_oldest();
    }
}

void ResultPool::drop_oldest() {
    idle_.front().unmap();
    idle_bytes_ -= idle_.front().num_bytes;
    idle_.erase(idle_.begin());
}

void ResultPool::close() {
    const std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
    while (!idle_.empty()) {
        drop_oldest();
    }
}

int64_t ResultPool::idle_bytes() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return idle_bytes_;
}

}  // namespace deepcomm::cpu
