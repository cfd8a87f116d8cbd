// SPDX-License-Identifier: Apache-2.0
#include "emu/scheduler.hpp"

#include <algorithm>

#include "emu/machine.hpp"

namespace deepcomm::emu {

const ThreadIdentity* current_identity = nullptr;

void Scheduler::reset() {
    *this = Scheduler();
    next_timer_ns_ = kNever;
    Random& random = machine->random;
    hash_ = 0xCBF29CE484222325ull;
    const uint32_t policy = random.below(4);
    if (policy == 2) stickiness_ = 8;
    if (policy == 3)
        laggard_ = static_cast<int>(random.below(static_cast<uint32_t>(machine->ranks.size())));
    constexpr uint32_t kAsyncPeriods[] = {4, 16, 64};
    async_period_ = kAsyncPeriods[random.below(3)];
}

// ---- the run queue

void Scheduler::make_runnable(Thread* thread) {
    if (thread->run_slot >= 0 || thread->is_finished) return;
    thread->run_slot = static_cast<int>(run_queue_.size());
    thread->wait = {};
    run_queue_.push_back(thread);
}

void Scheduler::dequeue(Thread* thread) {
    Thread* last = run_queue_.back();
    run_queue_[static_cast<size_t>(thread->run_slot)] = last;
    last->run_slot = thread->run_slot;
    run_queue_.pop_back();
    thread->run_slot = -1;
}

void Scheduler::park_current(const char* what, size_t offset, uint64_t deadline_ns) {
    Thread& me = *machine->current;
    dequeue(&me);
    me.wait = {what, offset, deadline_ns};
    if (deadline_ns == kNever) return;
    timed_.push_back(&me);
    next_timer_ns_ = std::min(next_timer_ns_, deadline_ns);
}

void Scheduler::shelve(Thread* thread, uint64_t until_ns) {
    dequeue(thread);
    thread->wait.what = until_ns == kNever ? "stopped (injected)" : "delayed (injected)";
    shelved_.push_back({thread, until_ns});
    next_timer_ns_ = std::min(next_timer_ns_, until_ns);
}

/// Wakes whoever's time has come and finds the next time to look.
void Scheduler::expire_timers(bool always) {
    const uint64_t now = now_ns();
    if (now < next_timer_ns_ && !always) return;
    next_timer_ns_ = kNever;
    std::vector<Thread*> still_timed;
    for (Thread* thread : timed_) {
        const uint64_t deadline = thread->wait.deadline_ns;
        if (thread->run_slot >= 0 || thread->is_finished || deadline == kNever) continue;
        if (deadline <= now) {
            make_runnable(thread);
        } else {
            still_timed.push_back(thread);
            next_timer_ns_ = std::min(next_timer_ns_, deadline);
        }
    }
    timed_ = std::move(still_timed);
    std::vector<Shelved> still_shelved;
    for (const Shelved& entry : shelved_) {
        if (entry.until_ns <= now) {
            make_runnable(entry.thread);
        } else {
            still_shelved.push_back(entry);
            next_timer_ns_ = std::min(next_timer_ns_, entry.until_ns);
        }
    }
    shelved_ = std::move(still_shelved);
}

/// Nothing can run: jumps to the earliest deadline, thaw or arrival. False if there is none.
bool Scheduler::skip_to_next_event() {
    expire_timers(true);  // drops timers of threads that something else has woken
    const uint64_t next =
        std::min({next_timer_ns_, machine->async.next_ready_ns(), host_deadline_ns_});
    if (next == kNever) return false;
    if (next > now_ns()) skipped_ns_ += next - now_ns();
    return true;
}

bool Scheduler::is_stopped(int rank) const {
    const Faults& faults = machine->options.faults;
    return rank == faults.stop_rank && now_ns() >= faults.stop_at_ns;
}

uint64_t Scheduler::frozen_until(int rank) const {
    if (is_stopped(rank)) return kNever;
    const Faults& faults = machine->options.faults;
    const uint64_t now = now_ns();
    const uint64_t thaw_ns = faults.delay_from_ns + faults.delay_for_ns;
    if (rank == faults.delay_rank && now >= faults.delay_from_ns && now < thaw_ns) return thaw_ns;
    return 0;
}

// ---- the choice

Thread* Scheduler::choose() {
    Random& random = machine->random;
    const auto draw = [&] {
        return run_queue_[random.below(static_cast<uint32_t>(run_queue_.size()))];
    };
    Thread* thread = draw();
    constexpr int kSecondLooks = 3;
    for (int i = 0; i < kSecondLooks && thread->rank == laggard_; ++i) thread = draw();
    return thread;
}

void Scheduler::check_limits() {
    const Options& options = machine->options;
    if (ticks_ > options.max_steps) fail("gave up after %zu steps", options.max_steps);
    const uint64_t limit = options.max_idle_steps + 1000 * machine->threads.size();
    if (ticks_ - last_progress_ > limit) {
        fail("livelock: %zu steps of loads only; a wait spins without parking", limit);
    }
}

/// Returns the next thread to run, or null for the host.
Thread* Scheduler::pick() {
    for (;;) {
        ++ticks_;
        if (now_ns() >= host_deadline_ns_) wants_host_ = true;
        if (wants_host_ || !machine->error.empty()) return nullptr;
        expire_timers(false);
        AsyncEngine& async = machine->async;
        const bool no_thread = is_idle();
        if (async.has_ready() && (no_thread || machine->random.one_in(async_period_))) {
            async.step();
            note_progress();
            continue;
        }
        if (no_thread) {
            if (stops_when_idle_) wants_host_ = true;
            if (wants_host_ || !skip_to_next_event()) return nullptr;
            continue;
        }
        if (machine->current) check_limits();
        Thread* thread = choose();
        if (const uint64_t until = frozen_until(thread->rank)) {
            shelve(thread, until);
            continue;
        }
        return thread;
    }
}

// ---- switching

void Scheduler::switch_to(Thread* next) {
    Thread* me = machine->current;
    if (next == me) return;
    ++num_switches_;
    machine->current = next;
    current_identity = next;
    Context& from = me ? me->context : machine->host;
    Context& to = next ? next->context : machine->host;
    switch_context(from, to, me && me->is_finished);
}

void Scheduler::yield() {
    ++ticks_;
    if (stickiness_ > 1 && !machine->random.one_in(stickiness_)) {
        if (!wants_host_ && !frozen_until(machine->current->rank)) return;
    }
    switch_away();
}

void Scheduler::switch_away() {
    Thread* next = pick();
    note(next ? static_cast<uint64_t>(next->id) + 1 : 0);
    switch_to(next);
}

void Scheduler::switch_to_host() { switch_to(nullptr); }

bool Scheduler::run_from_host() {
    wants_host_ = false;
    Thread* next = pick();
    if (!next) return wants_host_;
    switch_to(next);
    return true;
}

}  // namespace deepcomm::emu
