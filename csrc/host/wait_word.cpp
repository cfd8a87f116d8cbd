// SPDX-License-Identifier: Apache-2.0
#include "host/wait_word.hpp"

#include <chrono>
#include <thread>

#include "host/shared_record.hpp"

namespace deepcomm::host {

namespace {

using Clock = std::chrono::steady_clock;

// A kernel often answers within tens of microseconds, and being woken takes longer than that.
constexpr auto kSpin = std::chrono::microseconds(20);
constexpr auto kYield = std::chrono::milliseconds(1);
constexpr auto kNap = std::chrono::microseconds(20);
constexpr auto kSlice = std::chrono::milliseconds(50);

void pause(Clock::duration waited) {
    if (waited > kYield) {
        std::this_thread::sleep_for(kNap);
    } else if (waited > kSpin) {
        std::this_thread::yield();
    }
}

}  // namespace

bool wait_word(const uint64_t* word, uint64_t expected, const layout::ErrorRecord* record,
               double timeout_s, const std::function<void()>& check_interrupt) {
    const auto start = Clock::now();
    const auto timeout = std::chrono::duration<double>(timeout_s);
    auto next_check = start + kSlice;
    while (load_acquire(word) != expected) {
        const auto now = Clock::now();
        if (is_complete(&record->state) || now - start > timeout) {
            return load_acquire(word) == expected;  // it may have come between the two looks
        }
        if (now > next_check) {
            check_interrupt();
            next_check = now + kSlice;
        }
        pause(now - start);
    }
    return true;
}

}  // namespace deepcomm::host
