// SPDX-License-Identifier: Apache-2.0
// The state of one run: ranks, blocks, warps and threads, and the modules that act on them. There
// is one machine a process; Cluster resets it for every seed. One OS thread, so nothing is locked.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "emu/async.hpp"
#include "emu/clock.hpp"
#include "emu/cluster.hpp"
#include "emu/device_api.hpp"
#include "emu/fiber.hpp"
#include "emu/memory.hpp"
#include "emu/random.hpp"
#include "emu/scheduler.hpp"
#include "emu/strong.hpp"
#include "emu/types.hpp"

namespace deepcomm::emu {

struct Block;
struct Warp;

/// What a parked thread waits for; for the scheduler (deadline) and for the deadlock report.
struct Wait {
    const char* what = "runnable";
    size_t offset = Memory::kOutside;
    uint64_t deadline_ns = kNever;
    size_t other = Memory::kOutside;  ///< a word that ends it as well
};

/// Copies that one thread committed together, oldest group first.
struct BulkGroup {
    uint32_t sequence;
    int num_unread = 0;
    int num_unwritten = 0;
    std::vector<AgentSpan> copies;
};

/// What a strong load returned.
struct RecentRead {
    size_t offset = Memory::kOutside;
    size_t index = 0;
};

struct Thread : ThreadIdentity {
    int id = 0;         ///< actor id: the index of its clock entry
    int stack_idx = 0;  ///< of the pool
    int rank = 0;
    int lane = 0;
    Block* block = nullptr;
    Warp* warp = nullptr;
    Context context;

    // What it knows, and what it will tell or learn at its next fence.
    Knowledge know;
    uint32_t epoch = 1;              ///< of its current accesses; advances whenever it publishes
    uint32_t first_epoch = 1;        ///< of the running kernel
    Knowledge fenced[kNumScopes];    ///< told by its later relaxed stores: snapshots at fences
    Knowledge unfenced[kNumScopes];  ///< read by relaxed loads; learnt at a fence of that scope
    RecentRead recent_reads[4];      ///< of strong loads, to know whether a poll saw the newest
    uint32_t next_recent_read = 0;
    uint32_t polled_phase = 0;  ///< of the mbarrier that it polled last

    // Scheduling.
    bool is_finished = false;
    int run_slot = -1;  ///< index in the run queue, -1 while parked
    Wait wait;
    uint64_t collective_result = 0;  ///< of a warp's meeting
    bool barrier_flag = true;        ///< given to a block's meeting, then its result

    // Bulk copies.
    std::deque<BulkGroup> groups;
    BulkGroup open_group{};
    uint32_t next_group = 0;
    bool is_bulk_waiting = false;
};

struct WarpRendezvous {
    Collective kind;
    uint32_t mask;
    uint32_t arrived;
    uint64_t values[32];
    uint32_t arguments[32];
};

struct Warp {
    uint32_t alive = 0;
    Thread* lanes[32] = {};
    std::vector<WarpRendezvous> pending;
};

constexpr int kNumBarriers = 16;

struct Block {
    int rank = 0;
    int block_idx = 0;
    int num_live = 0;
    size_t smem_offset = 0;
    size_t smem_bytes = 0;
    int num_loads_in_flight = 0;  ///< bulk copies that still write its shared memory
    std::vector<Thread*> arrived[kNumBarriers];
    int expected[kNumBarriers] = {};  ///< threads named by the first arrival; 0: all
};

struct Step {
    bool is_barrier;
    Launch launch;
};

/// Memory to be freed once the kernels launched so far have ended, as a driver's free waits.
struct PendingFree {
    size_t offset;
    std::vector<int> num_ended;  ///< by rank: what has to be reached
};

struct SmemArea {
    size_t offset;
    size_t num_bytes;
};

struct Rank {
    std::deque<Step> program;
    std::vector<Thread*> threads;  ///< as many as its widest kernel so far has
    int num_live = 0;              ///< threads of the running kernel
    int num_copies = 0;            ///< asynchronous operations issued by it and still in flight
    bool is_running = false;
    int num_queued = 0;    ///< kernels launched
    int num_launches = 0;  ///< kernels begun
    int num_ended = 0;
    Knowledge know;       ///< what its stream knows between kernels
    Knowledge host_know;  ///< what its host knows
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<std::unique_ptr<Warp>> warps;
    std::vector<SmemArea> smem;
};

/// Thrown on the host's stack only; threads leave by a switch instead.
struct HostFailure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Machine {
    Options options;
    Random random;         ///< of the schedule
    Random shadow_random;  ///< of bookkeeping: compilers merge plain accesses, schedules must not
    Memory memory;
    StrongMemory strong;
    AsyncEngine async;
    Scheduler scheduler;
    StackPool stacks;

    std::deque<Rank> ranks;
    std::vector<PendingFree> pending_frees;
    std::deque<Thread> threads;
    std::vector<Thread*> thread_of_entry;  ///< by actor id; null for agents and views
    Thread* current = nullptr;             ///< null while the host runs
    Context host;
    std::string error;
    const std::function<void()>* kernel_of_current() const;

    void reset(int num_ranks, uint64_t seed, const Options& options);
    std::string run();
    /// Runs until the wait of at least one rank's host is over; says whose. None is over where
    /// only the host of a stopped rank waits.
    std::string run_until_any(const std::vector<HostWait>& waits, std::vector<char>* over);

    // ---- who is who
    static bool is_thread(int actor) { return actor >= AsyncEngine::kNumAgents; }
    const Thread& thread_of(int actor) const {
        return *thread_of_entry[static_cast<size_t>(is_thread(actor) ? actor
                                                                     : async.issuer_of(actor))];
    }
    /// Whether the kernel of an access has ended.
    bool has_ended(int actor, uint32_t epoch) const;
    /// Hands out the next index of all clocks.
    int new_clock_entry(Thread* thread = nullptr);
    int rank_of_actor(int actor) const;
    int device_of(int rank) const;
    std::string actor_name(int actor) const;
    /// Whether an operation of this scope by `from` includes `to`.
    bool includes(Scope scope, int from, int to) const;

    // ---- knowledge
    Actor actor(const Thread& thread, Access access) const {
        return {thread.id, thread.epoch, &thread.know, access, Proxy::kGeneric};
    }
    /// What the thread knows including its own accesses so far; later ones get a new epoch.
    Knowledge publish(Thread& thread);

    void print_event(const char* pattern, ...) __attribute__((format(printf, 2, 3)));

    // ---- rendezvous and life of threads (rendezvous.cpp, launch.cpp)
    void check_block_barriers(Block& block);
    void check_collectives(Warp& warp);
    void finish_current();
    bool start_ready_launches();
    void observe(int rank, const HostWait& wait);
    void launch(int rank, Launch launch);
    void free_later(size_t offset);
    void on_copy_done(int rank);

  private:
    void start_launch(Rank& rank, int rank_idx);
    void end_launch(Rank& rank);
    void create_block(Rank& rank, int rank_idx, int block_idx);
    void create_thread(Rank& rank, Block& block, int thread_idx);
    std::string describe_deadlock() const;
    std::string describe_wait(const Thread& thread) const;
    void free_what_is_due();
    bool is_done() const;
    bool is_over(int rank, const HostWait& wait) const;
    bool find_over(const std::vector<HostWait>& waits, std::vector<char>* over) const;
    uint64_t next_deadline(const std::vector<HostWait>& waits) const;
    bool only_stopped_wait(const std::vector<HostWait>& waits) const;
    void provide_threads(Rank& rank, size_t count);
};

extern Machine* machine;

/// Prints an event if asked to; the arguments are evaluated only then.
#define DEEPCOMM_EMU_TRACE(...)                                        \
    do {                                                               \
        if (machine->options.trace) machine->print_event(__VA_ARGS__); \
    } while (false)

/// The running thread; fails when a device function is called from the host.
Thread& self();

}  // namespace deepcomm::emu
