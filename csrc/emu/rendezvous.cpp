// SPDX-License-Identifier: Apache-2.0
// Where threads of a block or warp meet. Barriers and __syncwarp order memory; shuffles and ballots
// do not. Exited threads do not count.
#include <algorithm>

#include "emu/machine.hpp"

namespace deepcomm::emu {

namespace {

const char* name_of(Collective kind) {
    constexpr const char* kNames[] = {"syncwarp",    "ballot",     "match",       "shuffle",
                                      "shuffle_xor", "shuffle_up", "shuffle_down"};
    return kNames[static_cast<int>(kind)];
}

/// Lets everyone know what everyone knew, and go on.
void meet(Thread* const* threads, size_t count) {
    Knowledge joint = threads[0]->know;
    const Clock* joined = &threads[0]->know.seen;
    for (size_t i = 1; i < count; ++i) {
        if (threads[i]->know.seen.shares_with(*joined)) continue;  // threads that only read and
        joined = &threads[i]->know.seen;                           // write since the last meeting
        joint.join(threads[i]->know);
    }
    for (size_t i = 0; i < count; ++i) {
        Thread& thread = *threads[i];
        joint.seen.raise(static_cast<size_t>(thread.id), thread.epoch++);
        joint.proxied.join(thread.know.proxied);
    }
    for (size_t i = 0; i < count; ++i) {
        threads[i]->know = joint;
        machine->scheduler.make_runnable(threads[i]);
    }
    machine->scheduler.note_progress();
    DEEPCOMM_EMU_TRACE("%zu threads met, with %s", count,
                       machine->actor_name(threads[0]->id).c_str());
}

/// The lanes that have brought this value.
uint64_t lanes_with(const WarpRendezvous& meeting, uint64_t value) {
    uint64_t lanes = 0;
    for (int i = 0; i < 32; ++i) {
        const bool is_here = meeting.arrived >> i & 1;
        if (is_here && meeting.values[i] == value) lanes |= uint64_t{1} << i;
    }
    return lanes;
}

uint64_t result_for(const WarpRendezvous& meeting, int lane) {
    const auto argument = static_cast<int>(meeting.arguments[lane]);
    int source = lane;
    switch (meeting.kind) {
        case Collective::kSync: return 0;
        case Collective::kBallot: return lanes_with(meeting, 1);
        case Collective::kMatch: return lanes_with(meeting, meeting.values[lane]);
        case Collective::kShuffle: source = argument & 31; break;
        case Collective::kShuffleXor: source = lane ^ argument; break;
        case Collective::kShuffleUp: source = lane - argument; break;
        case Collective::kShuffleDown: source = lane + argument; break;
    }
    if (source < 0 || source > 31) return meeting.values[lane];
    constexpr uint64_t kGarbage = 0xDEADBEEFDEADBEEFull;  // reading an absent lane is undefined
    return meeting.arrived >> source & 1 ? meeting.values[source] : kGarbage;
}

}  // namespace

// ---- block barriers

void Machine::check_block_barriers(Block& block) {
    for (int idx = 0; idx < kNumBarriers; ++idx) {
        std::vector<Thread*>& arrived = block.arrived[idx];
        if (arrived.empty()) continue;
        const int needed = block.expected[idx] ? block.expected[idx] : block.num_live;
        if (static_cast<int>(arrived.size()) < needed) continue;
        const std::vector<Thread*> met = std::move(arrived);
        arrived.clear();
        const bool all = std::all_of(met.begin(), met.end(),
                                     [](const Thread* thread) { return thread->barrier_flag; });
        for (Thread* thread : met) thread->barrier_flag = all;
        meet(met.data(), met.size());
    }
}

static bool arrive_at_barrier(const char* what, int idx, int num_threads, bool flag) {
    Thread& me = self();
    Block& block = *me.block;
    if (block.arrived[idx].empty()) {
        block.expected[idx] = num_threads;
    } else if (block.expected[idx] != num_threads) {
        fail("%s at barrier %d for %d threads, others wait there for %d",
             machine->actor_name(me.id).c_str(), idx, num_threads, block.expected[idx]);
    }
    me.barrier_flag = flag;
    block.arrived[idx].push_back(&me);
    machine->scheduler.park_current(what, Memory::kOutside, kNever);
    machine->check_block_barriers(block);
    machine->scheduler.switch_away();
    return me.barrier_flag;
}

bool block_barrier(bool flag) { return arrive_at_barrier("block barrier", 0, 0, flag); }

bool named_barrier(int barrier_idx, int num_threads, bool flag) {
    if (barrier_idx <= 0 || barrier_idx >= kNumBarriers || num_threads <= 0 || num_threads % 32) {
        fail("named barrier %d for %d threads: index in 1..15, whole warps", barrier_idx,
             num_threads);
    }
    return arrive_at_barrier("named barrier", barrier_idx, num_threads, flag);
}

// ---- warp collectives

void Machine::check_collectives(Warp& warp) {
    for (size_t i = 0; i < warp.pending.size();) {
        const WarpRendezvous meeting = warp.pending[i];
        if (meeting.mask & warp.alive & ~meeting.arrived) {
            ++i;
            continue;
        }
        warp.pending.erase(warp.pending.begin() + static_cast<long>(i));
        Thread* met[32];
        size_t count = 0;
        for (int lane = 0; lane < 32; ++lane) {
            if (!(meeting.arrived >> lane & 1)) continue;
            Thread* thread = warp.lanes[lane];
            thread->collective_result = result_for(meeting, lane);
            met[count++] = thread;
            if (meeting.kind != Collective::kSync) scheduler.make_runnable(thread);
        }
        if (meeting.kind == Collective::kSync) meet(met, count);
    }
}

/// Finds the meeting that the lane joins; a lane that others expect elsewhere is an error at once.
static WarpRendezvous& find_meeting(Warp& warp, Collective kind, uint32_t mask, uint32_t my_bit) {
    WarpRendezvous* mine = nullptr;
    for (WarpRendezvous& meeting : warp.pending) {
        if (meeting.kind == kind && meeting.mask == mask && !(meeting.arrived & my_bit)) {
            mine = &meeting;
        } else if ((meeting.mask & my_bit) && (meeting.arrived & mask)) {
            fail("%s is in %s(mask %08x) while lanes %08x wait for it in %s(mask %08x)",
                 machine->actor_name(self().id).c_str(), name_of(kind), mask, meeting.arrived,
                 name_of(meeting.kind), meeting.mask);
        }
    }
    if (mine) return *mine;
    warp.pending.push_back({kind, mask, 0, {}, {}});
    return warp.pending.back();
}

uint64_t warp_collective(Collective kind, uint32_t mask, uint64_t value, uint32_t argument) {
    Thread& me = self();
    const uint32_t my_bit = 1u << me.lane;
    if (!(mask & my_bit)) {
        fail("%s calls %s with mask %08x, which leaves out its own lane",
             machine->actor_name(me.id).c_str(), name_of(kind), mask);
    }
    WarpRendezvous& meeting = find_meeting(*me.warp, kind, mask, my_bit);
    meeting.arrived |= my_bit;
    meeting.values[me.lane] = value;
    meeting.arguments[me.lane] = argument;
    machine->scheduler.park_current(name_of(kind), Memory::kOutside, kNever);
    machine->check_collectives(*me.warp);
    machine->scheduler.switch_away();
    return me.collective_result;
}

}  // namespace deepcomm::emu
