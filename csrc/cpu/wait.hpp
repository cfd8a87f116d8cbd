// SPDX-License-Identifier: Apache-2.0
// The one bounded wait of the CPU backend: sleeps on this rank's doorbell until a condition that a
// peer makes true holds, the peer is lost, or the deadline passes.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "common/error.hpp"
#include "cpu/control.hpp"
#include "cpu/segment.hpp"

namespace deepcomm::cpu {

/// One rank of this node as seen from here, this rank included.
struct Peer {
    int32_t rank = 0;
    std::shared_ptr<Segment> segment;
    Control* control = nullptr;
    int pid_fd = -1;       ///< readable when the process has ended; -1 where it cannot be watched
    bool ignored = false;  ///< masked: its failure does not fail others
};

/// Wakes target's waits after a change it may be waiting for.
void ring_doorbell(Control& target);

struct WaitPolicy {
    double timeout_s;
    double late_warning_s;
    bool may_spin;  ///< no more runnable threads than cores: a short spin beats a sleep
    std::function<void(const std::string&)> log_warning;
    std::function<void()> check_interrupt;  ///< called between slices; may throw
};

class Waiter {
  public:
    Waiter(int32_t rank, Control& own, const std::vector<Peer>& peers, WaitPolicy policy)
        : rank_(rank), own_(own), peers_(peers), policy_(std::move(policy)) {}

    /// Returns once ready() holds. Throws CommTimeout, or PeerLost where awaited (an index into
    /// peers) or whoever awaited depends on is gone. Adds the microseconds spent to spent_us,
    /// however it ends.
    template <typename Ready>
    void wait_until(int32_t awaited, const char* operation, const char* what, int64_t& spent_us,
                    Ready&& ready) {
        if (ready()) {
            return;
        }
        const auto start = Clock::now();
        const Stopwatch stopwatch{start, spent_us};
        if (policy_.may_spin && spin(ready, start)) {
            return;
        }
        Progress progress{start, start, false};
        while (!ready_or_asleep(ready)) {
            try {
                watch(awaited, operation, what, progress);
            } catch (const PeerLost&) {
                if (!ready()) {  // else the peer delivered and left between the two looks
                    throw;
                }
                break;
            }
        }
    }

    /// Whether the failure of a peer other than the awaited one is none of this wait's concern.
    void set_tolerant(bool tolerant) { tolerant_ = tolerant; }

  private:
    using Clock = std::chrono::steady_clock;

    struct Stopwatch {
        Clock::time_point start;
        int64_t& total_us;
        ~Stopwatch() { total_us += elapsed_us(start); }
    };

    struct Progress {
        Clock::time_point start;
        Clock::time_point last_slice;
        bool warned;
    };

    /// Looks again and again for as long as being woken by the kernel would take.
    template <typename Ready>
    static bool spin(Ready& ready, Clock::time_point start) {
        constexpr auto kSpinTime = std::chrono::microseconds(100);
        constexpr int kLooksPerClock = 16;
        while (Clock::now() - start < kSpinTime) {
            for (int look = 0; look < kLooksPerClock; ++look) {
                if (ready()) {
                    return true;
                }
                pause();
            }
        }
        return false;
    }

    /// Sleeps one slice at most, unless ready. ORDER: num_waiters is raised before the last look at
    /// the condition, and ring_doorbell looks at num_waiters after the change: one of them sees it.
    template <typename Ready>
    bool ready_or_asleep(Ready& ready) {
        own_.num_waiters.fetch_add(1, std::memory_order_seq_cst);
        const uint32_t seen = own_.doorbell.load(std::memory_order_seq_cst);
        const bool is_ready = ready();
        if (!is_ready) {
            sleep(seen);
        }
        own_.num_waiters.fetch_sub(1, std::memory_order_seq_cst);
        return is_ready || ready();
    }

    static void pause();
    static int64_t elapsed_us(Clock::time_point start);
    void sleep(uint32_t seen);
    void watch(int32_t awaited, const char* operation, const char* what, Progress& progress);
    void check_lost(int32_t awaited, const char* operation, const char* what) const;

    int32_t rank_;
    Control& own_;
    const std::vector<Peer>& peers_;
    WaitPolicy policy_;
    bool tolerant_ = false;
};

}  // namespace deepcomm::cpu
