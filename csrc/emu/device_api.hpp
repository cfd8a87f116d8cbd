// SPDX-License-Identifier: Apache-2.0
// What the emulated device layer (device/emu/) and the compiler's hooks call: one entry for each
// kind of instruction. Every function here acts for the running thread.
#pragma once

#include <cstddef>
#include <cstdint>

#include "emu/types.hpp"

namespace deepcomm::emu {

extern const ThreadIdentity* current_identity;  ///< of the running thread; changes at a switch

/// Ends the run with a formatted message; never returns to the thread.
[[noreturn]] void fail(const char* pattern, ...) __attribute__((format(printf, 1, 2)));

// ---- strong memory operations; value and out point to size bytes (4, 8 or 16), naturally aligned

void strong_load(void* out, const void* address, int size, Order order, Scope scope);
void strong_store(void* address, const void* value, int size, Order order, Scope scope);

enum class Rmw : uint8_t { kAdd, kExchange, kCompareSwap, kOr };
struct RmwRequest {
    Rmw op;
    uint64_t operand;
    uint64_t expected = 0;  ///< kCompareSwap only
};
/// Returns the value before. size is 4 or 8.
uint64_t strong_rmw(void* address, int size, const RmwRequest& request, Order order, Scope scope);

void fence_acq_rel(Scope scope);
void fence_sc(Scope scope);
void fence_proxy_async();

// ---- plain accesses, called by the hooks of -fsanitize=thread

void weak_read(const void* address, size_t num_bytes);
void weak_write(const void* address, size_t num_bytes);

// ---- time and control

uint64_t globaltimer_ns();
/// Parks a polling thread until the word (or mbarrier) at address changes, or another word that it polls
/// beside it, or the time has come.
void pause_on(const void* address, uint64_t deadline_ns, const void* other = nullptr);
void sleep_ns(uint64_t duration_ns);
[[noreturn]] void exit_thread();

// ---- rendezvous

/// Return whether flag was true for every thread that met.
bool block_barrier(bool flag);
bool named_barrier(int barrier_idx, int num_threads, bool flag);

enum class Collective : uint8_t {
    kSync,
    kBallot,
    kMatch,
    kShuffle,
    kShuffleXor,
    kShuffleUp,
    kShuffleDown,
};
/// Returns the ballot, the lanes that match or the value received; argument is a lane, a mask or a
/// distance.
uint64_t warp_collective(Collective kind, uint32_t mask, uint64_t value, uint32_t argument);

// ---- shared memory, mbarriers, bulk copies

void* shared_memory(size_t num_bytes);

void mbarrier_init(void* mbarrier, uint32_t num_arrivals);
void fence_mbarrier_init();
void mbarrier_arrive(void* mbarrier, uint32_t expected_bytes);
bool mbarrier_try_wait(void* mbarrier, uint32_t parity);

void bulk_load(void* shared_dst, const void* global_src, uint32_t num_bytes, void* mbarrier);
void bulk_store(void* global_dst, const void* shared_src, uint32_t num_bytes);
void bulk_commit();
/// Waits until at most max_pending of the newest groups are unfinished (or, with reads_only,
/// still read their source).
void bulk_wait(uint32_t max_pending, bool reads_only);

// ---- rails: a signal follows the puts of the same (context, peer) that happen before it; nothing
// else is ordered

struct RailPeer {
    int context;
    int rank;
};
void rail_put(RailPeer peer, void* dst, const void* src, uint32_t num_bytes);
void rail_signal_add(RailPeer peer, uint64_t* word, uint64_t value);
/// As NCCL's device API does it. Once the source has been read, a counter of this rank grows by one;
/// at most kMostCountedPuts to a peer may be uncounted. A signal also tells what its thread knows.
constexpr int kMostCountedPuts = 32;
void rail_put_counted(RailPeer peer, void* dst, const void* src, uint32_t num_bytes,
                      uint64_t* counter);
void rail_signal_add_told(RailPeer peer, uint64_t* word, uint64_t value);
/// Waits until this rank's puts on the context no longer need their sources.
void rail_flush(int context);

}  // namespace deepcomm::emu
