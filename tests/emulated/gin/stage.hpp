// SPDX-License-Identifier: Apache-2.0
// Ranks with rail agents, as a host prepares them: a kernel before each move fills its sources anew,
// one behind it looks at what has come.
#pragma once

#include <array>
#include <vector>

#include "emu/cluster.hpp"
#include "harness.hpp"
#include "kernels/gin/agent.cuh"

namespace deepcomm::testing {

namespace {

using emu::Cluster;
using emu::Fill;
using kernels::GinParams;
using layout::ErrorRecord;
using layout::FailureKind;
using layout::GinPeer;
using layout::GinSpan;
using layout::RecordState;

constexpr int kMaxRanks = 4;
constexpr int64_t kWindowBytes = 16384;  // of each of two, besides the control window

struct Piece {
    GinSpan from, to;
};
using Pieces = std::vector<Piece>;

/// What goes from each rank to each other in one move.
struct Plan {
    Pieces pieces[kMaxRanks][kMaxRanks];
};

uint32_t word_of(int move, int src, int dst, const Piece& piece, int64_t index) {
    const int64_t place = piece.to.window * kWindowBytes + piece.to.offset + 4 * index;
    return static_cast<uint32_t>((move * 31 + src) * 31 + dst) * 0x9E3779B1u ^
           static_cast<uint32_t>(place);
}

/// One rank's memory, as a host prepares it.
struct Side {
    unsigned char* bases[3];  ///< control, then two windows
    uint64_t* signals;
    ErrorRecord* record;
    uint64_t* done;
    uint32_t* num_wrong;
    ncclDevComm* dev_comm;
    const void** windows;
    GinPeer* peers;  ///< of its newest move
    uint64_t num_puts[kMaxRanks], num_sends[kMaxRanks], num_receives[kMaxRanks];
    int num_moves;
};

class Stage {
  public:
    Stage(Cluster& cluster, int num_ranks) : cluster_(cluster), num_ranks_(num_ranks) {
        for (int rank = 0; rank < num_ranks; ++rank) prepare(rank);
        for (int rank = 0; rank < num_ranks; ++rank) introduce(rank);
    }

    Side& side(int rank) { return sides_[static_cast<size_t>(rank)]; }
    uint64_t signal(int rank, int idx) { return side(rank).signals[idx]; }

    /// One move of all ranks, with what is before and behind it.
    void launch(const Plan& plan) {
        for (int rank = 0; rank < num_ranks_; ++rank) {
            produce(rank, plan);
            launch_agent(rank, plan, plan);
            consume(rank, plan);
        }
    }
    /// A rank's agent, which sends by one plan and receives by another.
    void launch_agent(int rank, const Plan& sent, const Plan& expected);

    /// Says what went wrong, or nothing.
    std::string check() {
        for (int rank = 0; rank < num_ranks_; ++rank) {
            const std::string problem = check_rank(rank);
            if (!problem.empty()) return problem;
        }
        return "";
    }

  private:
    void prepare(int rank);
    void introduce(int rank);
    GinPeer entry_of(Side& own, int peer, const Pieces& sends, const Pieces& receives);
    void produce(int rank, const Plan& plan);
    void consume(int rank, const Plan& plan);
    std::string check_rank(int rank);

    Cluster& cluster_;
    int num_ranks_;
    std::array<Side, kMaxRanks> sides_{};
};

void Stage::prepare(int rank) {
    Side& own = side(rank);
    const layout::GinControl control{num_ranks_};
    own.bases[0] =
        cluster_.alloc<unsigned char>(rank, "control", static_cast<size_t>(control.num_bytes()));
    for (int i = 1; i < 3; ++i) {
        own.bases[i] = cluster_.alloc<unsigned char>(rank, "window", kWindowBytes);
    }
    own.signals = cluster_.alloc<uint64_t>(rank, "signals", 2 * kMaxRanks, Fill::kZero);
    own.record = cluster_.alloc<ErrorRecord>(emu::kHostRank, "record", 1, Fill::kZero);
    own.done = cluster_.alloc<uint64_t>(emu::kHostRank, "done", 1, Fill::kZero);
    own.num_wrong = cluster_.alloc<uint32_t>(rank, "num_wrong", 1, Fill::kZero);
}

void Stage::introduce(int rank) {
    Side& own = side(rank);
    own.dev_comm = cluster_.alloc<ncclDevComm>(rank, "dev_comm", 1, Fill::kZero);
    const auto size = static_cast<uint32_t>(num_ranks_);
    *own.dev_comm = {rank, num_ranks_, 2 * size, size, {}, nullptr, nullptr};
    own.dev_comm->counters = cluster_.alloc<uint64_t>(rank, "counters", size, Fill::kZero);
    own.windows = cluster_.alloc<const void*>(emu::kHostRank, "windows", layout::kMostGinWindows,
                                              Fill::kZero);
    for (int i = 0; i < 3; ++i) {
        auto* window = cluster_.alloc<EmulatedWindow>(rank, "handle", 1, Fill::kZero);
        const int64_t control_bytes = layout::GinControl{num_ranks_}.num_bytes();
        window->num_bytes = static_cast<size_t>(i == 0 ? control_bytes : kWindowBytes);
        for (int peer = 0; peer < num_ranks_; ++peer) window->bases[peer] = side(peer).bases[i];
        own.windows[i] = window;
    }
    for (int peer = 0; peer < num_ranks_; ++peer) {
        own.dev_comm->signals[peer] = side(peer).signals;
    }
}

GinPeer Stage::entry_of(Side& own, int peer, const Pieces& sends, const Pieces& receives) {
    GinPeer entry{};
    entry.rank = peer;
    entry.num_sends = static_cast<int16_t>(sends.size());
    entry.num_receives = static_cast<int16_t>(receives.size());
    entry.num_puts = own.num_puts[peer];
    own.num_puts[peer] += receives.empty() ? 0 : 1;
    for (size_t i = 0; i < sends.size(); ++i) {
        entry.sends[i] = sends[i].from;
        const int64_t pieces = (sends[i].from.num_bytes - 1) / layout::kGinPutBytes + 1;
        own.num_puts[peer] += static_cast<uint64_t>(pieces);
    }
    for (size_t i = 0; i < receives.size(); ++i) entry.receives[i] = receives[i].to;
    entry.num_ready = own.num_sends[peer] += sends.empty() ? 0 : 1;
    entry.num_data = own.num_receives[peer] += receives.empty() ? 0 : 1;
    return entry;
}

void Stage::launch_agent(int rank, const Plan& sent, const Plan& expected) {
    Side& own = side(rank);
    auto* peers = cluster_.alloc<GinPeer>(emu::kHostRank, "peers", kMaxRanks, Fill::kZero);
    own.peers = peers;
    int num_peers = 0;
    for (int i = 1; i < num_ranks_; ++i) {
        const int peer = (rank + i) % num_ranks_;
        const Pieces& sends = sent.pieces[rank][peer];
        const Pieces& receives = expected.pieces[peer][rank];
        if (sends.empty() && receives.empty()) continue;
        peers[num_peers++] = entry_of(own, peer, sends, receives);
    }
    GinParams params{};
    params.comm.rank = rank;
    params.comm.num_ranks = num_ranks_;
    params.comm.timeout_ns = settings().timeout_ns;
    params.comm.record = own.record;
    params.dev_comm = own.dev_comm;
    params.windows = own.windows;
    params.control = own.bases[0];
    params.peers = peers;
    params.num_peers = num_peers;
    params.number = static_cast<uint64_t>(++own.num_moves);
    params.done = own.done;
    cluster_.launch(rank, {1, 64, 0, [=] { kernels::gin_move(params); }});
}

void Stage::produce(int rank, const Plan& plan) {
    const Side own = side(rank);
    const int move = own.num_moves + 1;
    cluster_.launch(rank, {1, 1, 0, [this, own, rank, move, plan] {
                               for (int peer = 0; peer < num_ranks_; ++peer) {
                                   for (const Piece& piece : plan.pieces[rank][peer]) {
                                       unsigned char* begin =
                                           own.bases[piece.from.window] + piece.from.offset;
                                       for (int64_t i = 0; i < piece.from.num_bytes / 4; ++i) {
                                           reinterpret_cast<uint32_t*>(begin)[i] =
                                               word_of(move, rank, peer, piece, i);
                                       }
                                   }
                               }
                           }});
}

void Stage::consume(int rank, const Plan& plan) {
    const Side own = side(rank);
    cluster_.launch(
        rank, {1, 1, 0, [this, own, rank, plan] {
                   const auto clear = static_cast<uint32_t>(RecordState::kClear);
                   if (device::ld_acquire_sys(&own.record->state) != clear) return;
                   for (int peer = 0; peer < num_ranks_; ++peer) {
                       for (const Piece& piece : plan.pieces[peer][rank]) {
                           unsigned char* begin = own.bases[piece.to.window] + piece.to.offset;
                           for (int64_t i = 0; i < piece.to.num_bytes / 4; ++i) {
                               const uint32_t expected =
                                   word_of(own.num_moves, peer, rank, piece, i);
                               const uint32_t got = reinterpret_cast<uint32_t*>(begin)[i];
                               *own.num_wrong += got != expected ? 1 : 0;
                           }
                       }
                   }
               }});
}

std::string Stage::check_rank(int rank) {
    Side& own = side(rank);
    const ErrorRecord& record = *own.record;
    if (record.state != static_cast<uint32_t>(RecordState::kClear)) {
        return format("%s: rank %d role %d peer %d slot %d expected %zu observed %zu",
                      record.kind == FailureKind::kTimeout ? "timeout" : "check", record.rank,
                      static_cast<int>(record.role), record.peer, record.slot,
                      static_cast<size_t>(record.expected), static_cast<size_t>(record.observed));
    }
    DEEPCOMM_EXPECT("num_wrong", rank, 0u, *own.num_wrong);
    DEEPCOMM_EXPECT("done", rank, static_cast<uint64_t>(own.num_moves), *own.done);
    return "";
}

// ---- plans: sources in window 1, destinations in window 2, but for spans that swap them

/// Places that do not overlap, in the order in which they are asked for.
struct Places {
    int64_t offsets[kMaxRanks][3] = {};

    GinSpan take(int rank, int64_t window, int64_t num_bytes) {
        const int64_t offset = offsets[rank][window];
        offsets[rank][window] += num_bytes;
        return {window, offset, num_bytes};
    }
    void add(Plan& plan, int src, int dst, int64_t num_bytes) {
        plan.pieces[src][dst].push_back({take(src, 1, num_bytes), take(dst, 2, num_bytes)});
    }
};

/// 0 to 3 spans each way, of 4 to 64 bytes; the same for every seed, other for every move.
Plan mixed_plan(int num_ranks, int move) {
    Plan plan;
    Places places;
    uint32_t state = 12345u + static_cast<uint32_t>(move);
    for (int src = 0; src < num_ranks; ++src) {
        for (int dst = 0; dst < num_ranks; ++dst) {
            state = state * 1664525u + 1013904223u;
            if (src == dst) continue;
            for (uint32_t i = 0; i < (state >> 28) % 4; ++i) {
                places.add(plan, src, dst, 4 * (1 + ((state >> (4 * i)) & 15)));
            }
        }
    }
    return plan;
}

Plan single_plan(int src, int dst, int64_t num_bytes, int num_spans = 1) {
    Plan plan;
    Places places;
    for (int i = 0; i < num_spans; ++i) places.add(plan, src, dst, num_bytes);
    return plan;
}

}  // namespace

}  // namespace deepcomm::testing
