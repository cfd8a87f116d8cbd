// SPDX-License-Identifier: Apache-2.0
// Operations that complete later: bulk copies, their mbarriers and groups, and rails. A copy reads
// its source and writes its destination at two separate random steps, as an agent of its own whose
// work only the completion mechanism teaches: the mbarrier's wait, wait_group, or a rail's signal.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <utility>
#include <vector>

#include "emu/clock.hpp"
#include "emu/cluster.hpp"
#include "emu/device_api.hpp"
#include "emu/memory.hpp"

namespace deepcomm::emu {

struct Thread;
struct Block;

/// The part of an agent's time line that belongs to one copy: its read, then its write.
struct AgentSpan {
    int agent;  ///< actor id, below kNumAgents
    uint32_t read_epoch;
    uint32_t write_epoch;
};

class AsyncEngine {
  public:
    static constexpr int kNumAgents = 64;

    void reset();

    // ---- mbarriers
    void mbarrier_init(Thread& me, size_t offset, uint32_t num_arrivals);
    void fence_mbarrier_init(Thread& me);
    void mbarrier_arrive(Thread& me, size_t offset, uint32_t expected_bytes);
    bool mbarrier_try_wait(Thread& me, size_t offset, uint32_t parity);
    /// Parks the thread until the phase that its last poll saw has ended.
    bool park_on_mbarrier(Thread& me, size_t offset, uint64_t deadline_ns);
    bool is_mbarrier(size_t offset) const { return mbarriers_.count(offset) != 0; }
    /// Forgets the mbarriers of shared memory that ends with its block.
    void drop_mbarriers(size_t offset, size_t num_bytes);

    // ---- bulk copies
    void bulk_load(Thread& me, size_t dst, size_t src, uint32_t num_bytes, size_t mbarrier);
    void bulk_store(Thread& me, size_t dst, size_t src, uint32_t num_bytes);
    void bulk_commit(Thread& me);
    void bulk_wait(Thread& me, uint32_t max_pending, bool reads_only);
    /// Fails if the thread leaves copies behind that still read its shared memory.
    void check_exit(const Thread& me) const;

    // ---- rails
    void rail_put(Thread& me, RailPeer peer, size_t dst, size_t src, uint32_t num_bytes,
                  size_t counter = Memory::kOutside);
    void rail_signal_add(Thread& me, RailPeer peer, size_t word, uint64_t value,
                         bool tells_all = false);
    void rail_flush(Thread& me, int context);

    // ---- progress
    bool has_ready();
    uint64_t next_ready_ns() const { return next_delayed_ns_; }
    void step();
    int issuer_of(int agent) const;
    /// Rank and number of its kernel that issued a copy.
    std::pair<int, int> launch_of(int agent, uint32_t epoch) const {
        return agent_launches_[agent][(epoch - 1) / 2];
    }

  private:
    enum class Kind { kBulkLoad, kBulkStore, kRailPut, kRailSignal, kRailCount };

    struct Lane;
    struct Operation {
        Kind kind;
        Thread* issuer;
        int rank;
        Block* block;  ///< of the issuer, for loads into its shared memory
        size_t dst;
        size_t src;
        uint32_t num_bytes;
        Knowledge know;  ///< of the issuer when it issued
        AgentSpan span;
        size_t mbarrier;        ///< bulk load
        uint32_t group;         ///< bulk store
        Lane* lane;             ///< rail
        uint64_t signal_value;  ///< rail signal
        int num_puts_before;    ///< rail signal: puts that must land first
        bool tells_all;         ///< rail signal: what its thread knows, too
        size_t counter;         ///< rail put: grows once the source is read; or kOutside
        AgentSpan counted;      ///< rail count: the put
        bool is_read;
        uint64_t ready_ns;
        std::vector<char> bytes;
        std::vector<uint8_t> defined;
    };

    /// Order of one rail context towards one peer.
    struct Lane {
        int num_issued = 0;
        int num_landed_in_order = 0;
        std::vector<bool> landed;
        std::vector<AgentSpan> puts;
        std::vector<std::pair<int, uint32_t>> issuers;  ///< thread and its epoch, by put
        int num_unread = 0;
        int num_uncounted = 0;
    };

    struct Mbarrier {
        size_t offset = 0;
        uint32_t expected = 0;
        uint32_t pending = 0;
        int64_t bytes = 0;  ///< announced minus completed in this phase
        int64_t issued_bytes = 0;
        int64_t announced_bytes = 0;
        uint32_t phase = 0;
        int init_thread = 0;
        uint32_t init_epoch = 0;
        bool is_published = false;  ///< by fence.mbarrier_init
        Knowledge arriving;         ///< told by this phase's arrivals and copies so far
        Knowledge completed;        ///< told by the last completed phase
        std::vector<Thread*> waiters;
    };

    AgentSpan take_agent(const Thread& me);
    Operation make(Thread& me, Kind kind, size_t dst, size_t src, uint32_t num_bytes);
    void submit(Operation operation);
    void promote_delayed();
    void read_source(Operation& operation);
    void land(Operation& operation);
    void complete(Operation& operation);
    void complete_store(const Operation& operation, bool is_written);
    void release_signals(Lane& lane);
    void count_read(const Operation& put);
    static void check_follows(const Thread& me, const Lane& lane);
    Mbarrier& find_mbarrier(Thread& me, size_t offset);
    void flip_if_complete(Mbarrier& mbarrier);
    Lane& lane(const Thread& me, RailPeer peer);
    bool is_satisfied(const Thread& me, uint32_t max_pending, bool reads_only) const;
    static Actor actor_of(const Operation& operation, uint32_t epoch);

    std::vector<Operation> active_;
    std::vector<Operation> delayed_;  ///< on a slow link
    std::vector<Operation> held_;     ///< rail signals whose puts have not landed
    uint64_t next_delayed_ns_ = kNever;
    uint32_t agent_epoch_[kNumAgents] = {};
    int agent_issuer_[kNumAgents] = {};
    std::vector<std::pair<int, int>> agent_launches_[kNumAgents];  ///< (rank, kernel) by copy
    std::map<size_t, Mbarrier> mbarriers_;
    std::map<std::pair<int, std::pair<int, int>>, Lane> lanes_;  ///< (rank, (context, peer))
    std::vector<Thread*> flushing_;
};

}  // namespace deepcomm::emu
