// SPDX-License-Identifier: Apache-2.0
// Work that warps take as they come to it. How fast the stores of an SM to a peer go differs by a
// factor of two between SMs, so that equal shares leave most of them waiting for the slowest.
#pragma once

#include "device/device.cuh"

namespace deepcomm::kernels {

constexpr int32_t kNumQueues = 2;  ///< words of MeetParams::taken: one a role
/// Word behind them, of sums between nodes: they have no end of their own, their opening zeroes it.
constexpr int32_t kQueueBetweenNodes = kNumQueues;

/// One warp's view of a role's pieces 0, 1, 2, ...: those that it takes, in ascending order. The first
/// kStatic of a worker follow from its number; they may be asked for before the ranks have met. The
/// others come from a word that counts how many were taken, and is 0 again after the operation. The
/// end is the user's: a piece beyond it is the warp's last.
template <int32_t kStatic>
struct WorkQueue {
    uint32_t* word;
    int32_t worker;       ///< or -1: who comes later, and has no piece of its own
    int32_t num_workers;  ///< with pieces of their own
    int32_t num_taken = 0;
    int32_t recent = 0;  ///< lane i: of the taken pieces, the latest whose number is i modulo 32
    uint32_t requested =
        0;  ///< leader: what it has asked for ahead, so that nobody waits for memory

    DEEPCOMM_DEVICE WorkQueue(uint32_t* taken, int32_t mine, int32_t of)
        : word(taken), worker(mine), num_workers(of) {}

    /// The warp's piece number n, none of which is 32 behind the latest. All lanes.
    DEEPCOMM_DEVICE int32_t at(int32_t n) {
        const int32_t num_own = worker < 0 ? 0 : kStatic;
        if (n < num_own) return worker + n * num_workers;
        while (num_taken <= n - num_own) take();
        return device::warp_shuffle(recent, n % device::kWarpSize);
    }

  private:
    DEEPCOMM_DEVICE void take() {
        const device::Warp warp;
        const uint32_t ticket = num_taken == 0 ? request() : requested;
        const int32_t piece =
            kStatic * num_workers + static_cast<int32_t>(device::warp_shuffle(ticket, 0));
        requested = request();
        const int32_t n = num_taken + (worker < 0 ? 0 : kStatic);
        if (warp.thread_idx() == n % warp.size()) recent = piece;
        ++num_taken;
    }
    DEEPCOMM_DEVICE uint32_t request() const {
        return device::Warp{}.is_leader() ? device::atom_add_relaxed_gpu(word, 1u) : 0u;
    }
};

/// The pieces of a WorkQueue<1> for who looks at each only once.
struct WorkStream {
    uint32_t* word;
    int32_t num_own;         ///< pieces that workers have by their number
    uint32_t requested = 0;  ///< leader: its next ticket

    /// Asks for a ticket, in whose time the first piece may be worked on.
    DEEPCOMM_DEVICE explicit WorkStream(const WorkQueue<1>& queue)
        : word(queue.word), num_own(queue.num_workers) {
        request();
    }
    DEEPCOMM_DEVICE int32_t next() {
        const uint32_t ticket = requested;
        request();
        return num_own + static_cast<int32_t>(device::warp_shuffle(ticket, 0));
    }

  private:
    DEEPCOMM_DEVICE void request() {
        requested = device::Warp{}.is_leader() ? device::atom_add_relaxed_gpu(word, 1u) : 0u;
    }
};

/// A queue of whose pieces only some hold anything, read by two cursors of a warp: the one that is behind
/// finds again what the other has found, however many empty pieces lay between.
template <int32_t kStatic>
struct FoundPieces {
    WorkQueue<kStatic> queue;
    int32_t num_read = 0;
    int32_t num_found = 0;
    int32_t recent = 0;  ///< as in the queue

    DEEPCOMM_DEVICE explicit FoundPieces(const WorkQueue<kStatic>& pieces) : queue(pieces) {}

    /// The warp's piece number n of those that are wanted, none of which is 32 behind the latest. All
    /// pieces beyond the end must be wanted.
    template <typename IsWanted>
    DEEPCOMM_DEVICE int32_t at(int32_t n, IsWanted&& is_wanted) {
        const device::Warp warp;
        while (num_found <= n) {
            const int32_t piece = queue.at(num_read++);
            if (!is_wanted(piece)) continue;
            if (warp.thread_idx() == num_found % warp.size()) recent = piece;
            ++num_found;
        }
        return device::warp_shuffle(recent, n % device::kWarpSize);
    }
};

/// By the last block of an operation, once all others have taken their last piece.
DEEPCOMM_DEVICE void end_work(uint32_t* taken) {
    for (int32_t queue = 0; queue < kNumQueues; ++queue) {
        device::st_relaxed_gpu(taken + queue, 0);
    }
}

}  // namespace deepcomm::kernels
