// SPDX-License-Identifier: Apache-2.0
#include "cpu/wait.hpp"

#include <linux/futex.h>
#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>

#include "common/error.hpp"

namespace deepcomm::cpu {

namespace {

constexpr int64_t kSliceNs = 50'000'000;  // how soon a dead peer is noticed

long futex(std::atomic<uint32_t>& word, int operation, uint32_t value, const timespec* timeout) {
    // Not the PRIVATE variants: the word is shared between processes.
    return syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), operation, value, timeout,
                   nullptr, 0);
}

bool has_ended(int pid_fd) {
    if (pid_fd < 0) {
        return false;
    }
    pollfd entry{pid_fd, POLLIN, 0};
    return poll(&entry, 1, 0) == 1;
}

}  // namespace

void ring_doorbell(Control& target) {
    target.doorbell.fetch_add(1, std::memory_order_seq_cst);
    if (target.num_waiters.load(std::memory_order_seq_cst) > 0) {
        futex(target.doorbell, FUTEX_WAKE, INT_MAX, nullptr);
    }
}

void Waiter::pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

int64_t Waiter::elapsed_us(Clock::time_point start) {
    return std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - start).count();
}

void Waiter::sleep(uint32_t seen) {
    const timespec slice{0, kSliceNs};
    futex(own_.doorbell, FUTEX_WAIT, seen, &slice);
}

void Waiter::check_lost(int32_t awaited, const char* operation, const char* what) const {
    const int32_t awaited_rank = peers_[static_cast<size_t>(awaited)].rank;
    for (const Peer& peer : peers_) {
        if (tolerant_ && peer.rank != awaited_rank) {
            continue;
        }
        if (peer.rank != rank_ && !peer.ignored &&
            peer.control->state.load(std::memory_order_acquire) == PeerState::kFailed) {
            throw PeerLost(format("%s: rank %d: peer rank %d failed while waiting for %s: %s",
                                  operation, rank_, peer.rank, what, peer.control->message),
                           peer.control->culprit);
        }
    }
    const Peer& peer = peers_[static_cast<size_t>(awaited)];
    if (peer.control->state.load(std::memory_order_acquire) == PeerState::kClosed) {
        throw PeerLost(format("%s: rank %d: rank %d closed its buffer before %s", operation, rank_,
                              peer.rank, what),
                       peer.rank);
    }
    if (has_ended(peer.pid_fd)) {
        throw PeerLost(format("%s: rank %d: the process of rank %d ended before %s", operation,
                              rank_, peer.rank, what),
                       peer.rank);
    }
}

void Waiter::watch(int32_t awaited, const char* operation, const char* what, Progress& progress) {
    const auto now = Clock::now();
    if (now - progress.last_slice < std::chrono::nanoseconds(kSliceNs / 2)) {
        return;  // woken by news for another condition
    }
    progress.last_slice = now;
    check_lost(awaited, operation, what);
    if (policy_.check_interrupt) {
        policy_.check_interrupt();
    }
    const double waited_s = std::chrono::duration<double>(now - progress.start).count();
    const int32_t peer = peers_[static_cast<size_t>(awaited)].rank;
    if (waited_s >= policy_.timeout_s) {
        throw CommTimeout(format("%s: rank %d: rank %d did not come within %g s: waited for %s",
                                 operation, rank_, peer, policy_.timeout_s, what),
                          peer);
    }
    if (!progress.warned && waited_s >= policy_.late_warning_s) {
        progress.warned = true;
        if (policy_.log_warning) {
            policy_.log_warning(
                format("%s: rank %d: rank %d is late: waiting for %s since %.1f s "
                       "(fatal after %g s)",
                       operation, rank_, peer, what, waited_s, policy_.timeout_s));
        }
    }
}

}  // namespace deepcomm::cpu
