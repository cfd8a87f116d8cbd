// SPDX-License-Identifier: Apache-2.0
// The mbarriers of AsyncEngine: arrivals, transaction bytes and phases.
#include "emu/machine.hpp"

namespace deepcomm::emu {

void AsyncEngine::mbarrier_init(Thread& me, size_t offset, uint32_t num_arrivals) {
    if (offset % 8 || num_arrivals == 0) fail("mbarrier_init: misaligned or without arrivals");
    const auto known = mbarriers_.find(offset);
    if (known != mbarriers_.end() && known->second.issued_bytes != known->second.announced_bytes) {
        fail("mbarrier at %s is initialised while copies use it",
             machine->memory.describe(offset).c_str());
    }
    machine->memory.set_mbarrier(offset, true);
    Mbarrier fresh;
    fresh.offset = offset;
    fresh.expected = fresh.pending = num_arrivals;
    fresh.init_thread = me.id;
    fresh.init_epoch = me.epoch;
    mbarriers_[offset] = std::move(fresh);
    DEEPCOMM_EMU_TRACE("mbarrier init %s", machine->memory.describe(offset).c_str());
}

void AsyncEngine::fence_mbarrier_init(Thread& me) {
    for (auto& entry : mbarriers_) {
        if (entry.second.init_thread == me.id) entry.second.is_published = true;
    }
}

AsyncEngine::Mbarrier& AsyncEngine::find_mbarrier(Thread& me, size_t offset) {
    const auto found = mbarriers_.find(offset);
    if (found == mbarriers_.end()) {
        fail("mbarrier at %s is used by %s but was never initialised",
             machine->memory.describe(offset).c_str(), machine->actor_name(me.id).c_str());
    }
    Mbarrier& mbarrier = found->second;
    const bool knows_init =
        mbarrier.init_thread == me.id ||
        me.know.seen[static_cast<size_t>(mbarrier.init_thread)] >= mbarrier.init_epoch;
    if (!knows_init) {
        fail("race: mbarrier at %s is used by %s, unordered with its initialisation by %s",
             machine->memory.describe(offset).c_str(), machine->actor_name(me.id).c_str(),
             machine->actor_name(mbarrier.init_thread).c_str());
    }
    return mbarrier;
}

void AsyncEngine::flip_if_complete(Mbarrier& mbarrier) {
    if (mbarrier.pending != 0 || mbarrier.bytes != 0) return;
    ++mbarrier.phase;
    mbarrier.pending = mbarrier.expected;
    mbarrier.completed = std::move(mbarrier.arriving);
    mbarrier.arriving = {};
    for (Thread* waiter : mbarrier.waiters) {
        // Whoever ran out of time may wait for something else by now.
        if (waiter->wait.offset == mbarrier.offset) machine->scheduler.make_runnable(waiter);
    }
    mbarrier.waiters.clear();
    machine->scheduler.note_progress();
}

void AsyncEngine::mbarrier_arrive(Thread& me, size_t offset, uint32_t expected_bytes) {
    Mbarrier& mbarrier = find_mbarrier(me, offset);
    mbarrier.announced_bytes += expected_bytes;
    if (mbarrier.announced_bytes > mbarrier.issued_bytes) {
        fail(
            "mbarrier at %s expects %zd bytes of which only %zd are issued: the device layer "
            "issues "
            "copies before the arrival that expects them",
            machine->memory.describe(offset).c_str(),
            static_cast<ssize_t>(mbarrier.announced_bytes),
            static_cast<ssize_t>(mbarrier.issued_bytes));
    }
    mbarrier.bytes += expected_bytes;
    mbarrier.arriving.join(machine->publish(me));
    if (mbarrier.pending == 0) fail("mbarrier: more arrivals than it was initialised for");
    --mbarrier.pending;
    DEEPCOMM_EMU_TRACE("mbarrier arrive %s (%u bytes)", machine->memory.describe(offset).c_str(),
                       expected_bytes);
    flip_if_complete(mbarrier);
}

bool AsyncEngine::mbarrier_try_wait(Thread& me, size_t offset, uint32_t parity) {
    Mbarrier& mbarrier = find_mbarrier(me, offset);
    const bool is_complete = (mbarrier.phase & 1) != (parity & 1);
    machine->scheduler.note(mbarrier.phase);
    me.polled_phase = mbarrier.phase;
    if (is_complete) me.know.join(mbarrier.completed);
    return is_complete;
}

bool AsyncEngine::park_on_mbarrier(Thread& me, size_t offset, uint64_t deadline_ns) {
    Mbarrier& mbarrier = mbarriers_.at(offset);
    if (mbarrier.phase != me.polled_phase) return false;
    mbarrier.waiters.push_back(&me);
    machine->scheduler.park_current("mbarrier", offset, deadline_ns);
    return true;
}

void AsyncEngine::drop_mbarriers(size_t offset, size_t num_bytes) {
    mbarriers_.erase(mbarriers_.lower_bound(offset), mbarriers_.lower_bound(offset + num_bytes));
}

}  // namespace deepcomm::emu
