// SPDX-License-Identifier: Apache-2.0
// gin_move: the rail agent, one launch a move of the network. It tells peers where their bytes go, puts
// this rank's bytes where peers want them, and ends when both are through. PROTOCOLS.md: moves over GIN.
#pragma once

#if defined(__CUDACC__)
#include "kernels/gin/facts.cuh"
#endif
#include "kernels/gin/gin.cuh"
#include "kernels/gin/params.hpp"

namespace deepcomm::kernels {

constexpr int32_t kGinThreads = 256;
/// NCCL's proxy holds 32 operations a peer, and waits without a deadline for room.
constexpr uint64_t kMostGinPuts = 24;
/// What a check of a table has found to differ, where that is no span's size.
constexpr int32_t kGinNumber = -2;
constexpr int32_t kGinNumSpans = -3;

/// The leaders of the block's warps take peers in turn; of each peer one thread does everything.
struct GinAgent {
    const GinParams& params;
    GinContext context;

    using Peer = layout::GinPeer;
    using Span = layout::GinSpan;
    using Table = layout::GinTable;

    DEEPCOMM_DEVICE layout::GinControl control() const { return {params.comm.num_ranks}; }
    DEEPCOMM_DEVICE Table* table(int64_t offset) const {
        return reinterpret_cast<Table*>(params.control + offset);
    }
    DEEPCOMM_DEVICE const void* window(int64_t place) const { return params.windows[place]; }
    /// Signals of a rank, by the peer that raises them.
    static DEEPCOMM_DEVICE uint32_t ready(int32_t rank) { return 2 * static_cast<uint32_t>(rank); }
    static DEEPCOMM_DEVICE uint32_t data(int32_t rank) { return ready(rank) + 1; }

    DEEPCOMM_DEVICE device::WaitSite site(device::Role role, int32_t peer) const {
        return {device::Operation::kMove, role, peer};
    }
    DEEPCOMM_DEVICE device::WaitContext waits() const {
        return {params.comm.record, params.comm.timeout_ns, params.comm.rank, params.comm.names};
    }
    DEEPCOMM_DEVICE bool has_failed() const {
        const auto clear = static_cast<uint32_t>(layout::RecordState::kClear);
        return device::ld_relaxed_sys(&params.comm.record->state) != clear;
    }

    DEEPCOMM_DEVICE bool await_signal(device::Role role, int32_t peer, uint32_t signal,
                                      uint64_t expected) const {
        return device::wait_until(waits(), site(role, peer), expected,
                                  context.polled_signal(signal), [&]() -> device::Observed {
                                      const uint64_t value = context.signal(signal);
                                      return {value, value >= expected};
                                  });
    }
    /// Until so many of the puts to a peer no longer need their sources.
    DEEPCOMM_DEVICE bool await_read(int32_t peer, uint64_t expected) const {
        const auto counter = static_cast<uint32_t>(peer);
        return device::wait_until(waits(), site(device::Role::kSend, peer), expected,
                                  context.polled_counter(counter), [&]() -> device::Observed {
                                      const uint64_t value = context.counter(counter);
                                      return {value, value >= expected};
                                  });
    }

    /// Tells a peer where its bytes go.
    DEEPCOMM_DEVICE void tell(const Peer& peer) const {
        if (peer.num_receives == 0) return;
        const int64_t offset = control().outgoing(peer.rank);
        Table* to = table(offset);
        to->number = peer.num_data;
        to->num_spans = peer.num_receives;
        for (int32_t i = 0; i < peer.num_receives; ++i) to->spans[i] = peer.receives[i];
        // ORDER: the table before the network reads it
        device::fence_acq_rel_sys();
        const void* own = window(0);
        context.put_and_signal(
            peer.rank,
            {own, control().incoming(params.comm.rank), own, offset, int64_t{sizeof(Table)}},
            static_cast<uint32_t>(peer.rank), ready(params.comm.rank));
    }

    /// Whether the peer expects what this rank sends; else that is recorded.
    DEEPCOMM_DEVICE bool agrees(const Peer& peer, const Table& theirs) const {
        device::WaitSite where = site(device::Role::kSend, peer.rank);
        const auto differ = [&](int32_t slot, uint64_t mine, uint64_t got) {
            if (mine == got) return false;
            where.slot = slot;
            device::record_failure(waits(), where, device::FailureKind::kCheck, mine, got);
            return true;
        };
        if (differ(kGinNumber, peer.num_ready, theirs.number)) return false;
        const auto num_spans = static_cast<uint64_t>(theirs.num_spans);
        if (differ(kGinNumSpans, static_cast<uint64_t>(peer.num_sends), num_spans)) return false;
        for (int32_t i = 0; i < peer.num_sends; ++i) {
            if (differ(i, static_cast<uint64_t>(peer.sends[i].num_bytes),
                       static_cast<uint64_t>(theirs.spans[i].num_bytes))) {
                return false;
            }
        }
        return true;
    }

    /// Puts one span, the last piece with the signal that all is there. Counts puts in num_puts.
    DEEPCOMM_DEVICE bool put_span(int32_t peer, const Span& from, const Span& to, bool is_last,
                                  uint64_t& num_puts) const {
        const auto counter = static_cast<uint32_t>(peer);
        for (int64_t begin = 0; begin < from.num_bytes; begin += layout::kGinPutBytes) {
            const int64_t left = from.num_bytes - begin;
            const int64_t num_bytes = left < layout::kGinPutBytes ? left : layout::kGinPutBytes;
            const GinContext::Copy copy = {window(to.window), to.offset + begin,
                                           window(from.window), from.offset + begin, num_bytes};
            if (num_puts >= kMostGinPuts && !await_read(peer, num_puts + 1 - kMostGinPuts)) {
                return false;
            }
            ++num_puts;
            if (is_last && left == num_bytes) {
                context.put_and_signal(peer, copy, counter, data(params.comm.rank));
            } else {
                context.put(peer, copy, counter);
            }
        }
        return true;
    }

    /// Sends what a peer is waiting for, and waits until the sources may be reused.
    DEEPCOMM_DEVICE bool send(const Peer& peer) const {
        uint64_t num_puts = peer.num_puts + (peer.num_receives > 0 ? 1 : 0);
        if (peer.num_sends > 0) {
            if (!await_signal(device::Role::kMeet, peer.rank, ready(peer.rank), peer.num_ready)) {
                return false;
            }
            const Table& theirs = *table(control().incoming(peer.rank));
            if (!agrees(peer, theirs)) return false;
            for (int32_t i = 0; i < peer.num_sends; ++i) {
                const bool is_last = i == peer.num_sends - 1;
                if (!put_span(peer.rank, peer.sends[i], theirs.spans[i], is_last, num_puts)) {
                    return false;
                }
            }
        }
        return await_read(peer.rank, num_puts);
    }
    DEEPCOMM_DEVICE bool receive(const Peer& peer) const {
        return peer.num_receives == 0 ||
               await_signal(device::Role::kReceive, peer.rank, data(peer.rank), peer.num_data);
    }

    /// Runs one step for all peers of the calling thread; false as soon as that has failed.
    template <typename Step>
    DEEPCOMM_DEVICE bool each_peer(Step&& step) const {
        const int32_t num_warps = static_cast<int32_t>(blockDim.x) / device::kWarpSize;
        for (int32_t i = device::Warp{}.warp_idx(); i < params.num_peers; i += num_warps) {
            if (!step(params.peers[i])) return false;
        }
        return true;
    }
    /// Peers are told before any is awaited: each waits for all others only after that.
    DEEPCOMM_DEVICE bool run() const {
        if (!device::Warp{}.is_leader()) return true;
        const auto told = [this](const Peer& peer) {
            tell(peer);
            return true;
        };
        return !has_failed() && each_peer(told) &&
               each_peer([this](const Peer& peer) { return send(peer); }) &&
               each_peer([this](const Peer& peer) { return receive(peer); });
    }
};

extern "C" __global__ void __launch_bounds__(kGinThreads, 1)
    gin_move(const __grid_constant__ GinParams params) {
    const device::Block block;
    const GinAgent agent = {params, GinContext(params.dev_comm)};
    const bool is_through = agent.run();
    // What peers put may come later, and what was put may still be read: later kernels do nothing.
    if (!is_through && params.comm.failed != nullptr) {
        device::st_relaxed_gpu(params.comm.failed, 1);
    }
    block.sync();  // ORDER: the ends of all threads before the host hears of it
    // ORDER: pairs with the host's acquire; also after a failure, so that the host may end things
    if (block.is_leader()) device::st_release_sys(params.done, params.number);
}

}  // namespace deepcomm::kernels
