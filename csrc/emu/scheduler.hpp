// SPDX-License-Identifier: Apache-2.0
// Who runs next, and what time it is. Threads switch at strong operations and rendezvous only. The
// choice is uniform over what can run, bent by a policy that the seed draws: sticky runs (a thread
// keeps its turn) and a laggard rank find other bugs than fairness does.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace deepcomm::emu {

struct Thread;

class Scheduler {
  public:
    void reset();

    uint64_t now_ns() const { return ticks_ * kStepNs + skipped_ns_; }
    uint64_t num_steps() const { return ticks_; }
    uint64_t num_switches() const { return num_switches_; }
    uint64_t trace_hash() const { return hash_; }

    /// Mixes an event into the hash that tells one schedule from another.
    void note(uint64_t event) { hash_ = (hash_ ^ event) * 0x100000001B3ull; }
    /// Tells the livelock check that something other than a load has happened.
    void note_progress() { last_progress_ = ticks_; }

    /// Whether a fault has stopped the rank.
    bool is_stopped(int rank) const;

    void make_runnable(Thread* thread);
    /// Takes the running thread off the run queue; the caller then calls switch_away.
    void park_current(const char* what, size_t offset, uint64_t deadline_ns);
    /// Lets another thread (or the same) run; returns when this one is chosen again.
    void yield();
    void switch_away();
    /// Resumes the host's loop from a thread that has failed.
    void switch_to_host();
    /// Runs threads from the host until one returns to it or none can run.
    /// Returns false when nothing can run any more.
    bool run_from_host();
    /// Asks for the host's loop at the next step: a kernel has ended.
    void request_host() { wants_host_ = true; }
    /// Returns to the host's loop at that time at the latest; kNever for none.
    void set_host_deadline(uint64_t deadline_ns) { host_deadline_ns_ = deadline_ns; }
    /// Whether to return to the host's loop rather than let time pass until a thread can run.
    void set_stop_when_idle(bool stops) { stops_when_idle_ = stops; }
    /// Whether no thread can run right now.
    bool is_idle() const { return run_queue_.empty(); }

  private:
    Thread* pick();
    Thread* choose();
    void shelve(Thread* thread, uint64_t until_ns);
    void expire_timers(bool always);
    bool skip_to_next_event();
    void check_limits();
    uint64_t frozen_until(int rank) const;
    void switch_to(Thread* next);
    void dequeue(Thread* thread);

    static constexpr uint64_t kStepNs = 10;

    struct Shelved {
        Thread* thread;
        uint64_t until_ns;
    };

    std::vector<Thread*> run_queue_;
    std::vector<Thread*> timed_;  ///< parked with a deadline, or once were
    std::vector<Shelved> shelved_;
    uint64_t next_timer_ns_ = 0;
    uint64_t host_deadline_ns_ = ~uint64_t{0};
    uint64_t ticks_ = 0;
    uint64_t skipped_ns_ = 0;
    uint64_t last_progress_ = 0;
    uint64_t num_switches_ = 0;
    uint64_t hash_ = 0;
    bool wants_host_ = false;
    bool stops_when_idle_ = false;

    uint32_t stickiness_ = 1;    ///< a yield switches once in this many times
    int laggard_ = -1;           ///< rank that is passed over most of the time
    uint32_t async_period_ = 1;  ///< an asynchronous step once in this many steps
};

}  // namespace deepcomm::emu
