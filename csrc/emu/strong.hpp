// SPDX-License-Identifier: Apache-2.0
// Strong memory operations: a list of messages for each location, out of which a load may take any
// that coherence and what the reader knows still allow. Stale reads are bounded: the third in a
// row is followed by the newest.
//
// Sound, not complete: no outcome that PTX forbids is produced; load buffering and 2+2W never are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <vector>

#include "emu/clock.hpp"
#include "emu/device_api.hpp"
#include "emu/memory.hpp"

namespace deepcomm::emu {

struct Thread;

struct StrongValue {
    uint64_t words[2] = {0, 0};
};

/// One write to a location, and what acquiring it teaches, by the scope of the release.
struct Message {
    StrongValue value;
    int writer = -1;  ///< actor id; -1: before the run
    uint32_t epoch = 0;
    Scope scope = Scope::kSys;  ///< of the write itself
    Knowledge released[kNumScopes];
    uint64_t visible_ns = 0;  ///< a slow link hides it from the other ranks until then
};

struct StaleReads {
    int thread;
    int count;
};

/// What a read-modify-write leaves behind.
uint64_t apply(const RmwRequest& request, uint64_t old_value);

struct Location {
    size_t offset;
    int size;
    bool is_hosts;  ///< in memory that hosts share
    int view = -1;  ///< clock entry that holds a reader's oldest readable message; -1: none yet
    std::vector<Message> messages;
    std::vector<Thread*> waiters;
    std::vector<StaleReads> stale;
    bool has_weak_write = false;  ///< a plain write came after the newest message
    int weak_writer = -1;
    uint32_t weak_epoch = 0;
};

class StrongMemory {
  public:
    void reset();

    void load(Thread& me, void* out, size_t offset, int size, Order order, Scope scope);
    void store(Thread& me, size_t offset, int size, const StrongValue& value, Order order,
               Scope scope);
    uint64_t rmw(Thread& me, size_t offset, int size, const RmwRequest& request, Order order,
                 Scope scope);
    void fence_acq_rel(Thread& me, Scope scope);
    void fence_sc(Thread& me, Scope scope);

    /// Adds to a word for an agent that is no thread, teaching `released` to whoever acquires it.
    void agent_add(const Actor& agent, size_t offset, uint64_t value, const Knowledge& released);

    /// Tells that plain bytes were written where messages may exist.
    void on_weak_write(const Actor& actor, size_t offset, size_t num_bytes);

    /// What the host learns from the newest message at offset, which it acquires.
    void teach_host(size_t offset, Knowledge* know) const;
    /// Makes messages of what hosts have stored in their memory since kernels ran last.
    void take_host_writes();

    /// Parks the thread until the location changes; false if it may poll again at once.
    bool park_on(Thread& me, size_t offset, size_t other, uint64_t deadline_ns);

  private:
    Location& locate(size_t offset, int size);
    void absorb_weak_write(Location& location);
    size_t oldest_readable(const Thread& me, const Location& location) const;
    size_t newest_visible(const Thread& me, const Location& location);
    Location* seen(const Thread& me, size_t offset, uint64_t* until_ns);
    size_t choose(Thread& me, Location& location);
    int& stale_reads(const Thread& me, Location& location);
    void remember_view(Thread& me, Location& location, size_t index);
    void learn(Thread& me, const Message& message, Order order, Scope scope);
    void append(Thread& me, Location& location, Message message, Order order, Scope scope);
    void push(Location& location, Message message);
    void tell_fences(Thread& me, Message& message, Scope scope);

    static constexpr int kMaxStaleReads = 3;

    std::deque<Location> locations_;
    std::vector<int> location_of_;  ///< index + 1 by word; 0: never accessed strongly
    Knowledge fence_order_sys_;     ///< what every fence.sc.sys so far has told
    std::vector<Knowledge> fence_order_rank_;
};

}  // namespace deepcomm::emu
