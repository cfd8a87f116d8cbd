// SPDX-License-Identifier: Apache-2.0
#include "emu/async.hpp"

#include <algorithm>
#include <cstring>

#include "emu/machine.hpp"

namespace deepcomm::emu {

namespace {

constexpr uint32_t kBulkAlign = 16;

void check_bulk(const Thread& me, size_t global, size_t shared, uint32_t num_bytes) {
    if (num_bytes == 0 || num_bytes % kBulkAlign || global % kBulkAlign || shared % kBulkAlign) {
        fail("bulk copy of %u bytes between %s and %s: sizes and addresses are multiples of 16",
             num_bytes, machine->memory.describe(global).c_str(),
             machine->memory.describe(shared).c_str());
    }
    const Block& block = *me.block;
    if (shared < block.smem_offset || shared + num_bytes > block.smem_offset + block.smem_bytes) {
        fail("bulk copy: %s is not the block's own shared memory",
             machine->memory.describe(shared).c_str());
    }
    machine->memory.check_bounds("bulk copy", global, num_bytes);
    machine->memory.check_bounds("bulk copy", shared, num_bytes);
}

}  // namespace

void AsyncEngine::reset() { *this = AsyncEngine(); }

// ---- agents and life of an operation

/// Copies take random agents: two copies of one agent look ordered, which can only hide a race, and
/// chance keeps that from hiding the same race in every seed.
AgentSpan AsyncEngine::take_agent(const Thread& me) {
    const auto index = machine->random.below(kNumAgents);
    const uint32_t read_epoch = ++agent_epoch_[index];
    const uint32_t write_epoch = ++agent_epoch_[index];
    agent_issuer_[index] = me.id;
    const int launch = machine->ranks[static_cast<size_t>(me.rank)].num_launches;
    agent_launches_[index].emplace_back(me.rank, launch);
    return {static_cast<int>(index), read_epoch, write_epoch};
}

int AsyncEngine::issuer_of(int agent) const { return agent_issuer_[agent]; }

AsyncEngine::Operation AsyncEngine::make(Thread& me, Kind kind, size_t dst, size_t src,
                                         uint32_t num_bytes) {
    Operation operation{};
    operation.kind = kind;
    operation.issuer = &me;
    operation.rank = me.rank;
    operation.block = me.block;
    operation.dst = dst;
    operation.src = src;
    operation.num_bytes = num_bytes;
    operation.know = machine->publish(me);
    operation.span = take_agent(me);
    return operation;
}

void AsyncEngine::submit(Operation operation) {
    const Faults& faults = machine->options.faults;
    ++machine->ranks[static_cast<size_t>(operation.rank)].num_copies;
    if (operation.rank == faults.slow_src &&
        machine->memory.rank_of(operation.dst) == faults.slow_dst) {
        operation.ready_ns = machine->scheduler.now_ns() + faults.slow_extra_ns;
        next_delayed_ns_ = std::min(next_delayed_ns_, operation.ready_ns);
        delayed_.push_back(std::move(operation));
        return;
    }
    active_.push_back(std::move(operation));
}

void AsyncEngine::promote_delayed() {
    const uint64_t now = machine->scheduler.now_ns();
    if (now < next_delayed_ns_) return;
    next_delayed_ns_ = kNever;
    std::vector<Operation> still_delayed;
    for (Operation& operation : delayed_) {
        if (operation.ready_ns <= now) {
            active_.push_back(std::move(operation));
        } else {
            next_delayed_ns_ = std::min(next_delayed_ns_, operation.ready_ns);
            still_delayed.push_back(std::move(operation));
        }
    }
    delayed_ = std::move(still_delayed);
}

bool AsyncEngine::has_ready() {
    promote_delayed();
    return !active_.empty();
}

void AsyncEngine::step() {
    const size_t index = machine->random.below(static_cast<uint32_t>(active_.size()));
    Operation& chosen = active_[index];
    const bool moves_bytes = chosen.kind != Kind::kRailSignal && chosen.kind != Kind::kRailCount;
    if (moves_bytes && !chosen.is_read) {
        read_source(chosen);
        machine->scheduler.note(0xA000 + index);
        return;
    }
    Operation operation = std::move(chosen);
    if (index + 1 != active_.size()) chosen = std::move(active_.back());
    active_.pop_back();
    machine->scheduler.note(0xB000 + index);
    land(operation);
    complete(operation);
    machine->on_copy_done(operation.rank);
}

Actor AsyncEngine::actor_of(const Operation& operation, uint32_t epoch) {
    const bool is_bulk = operation.kind == Kind::kBulkLoad || operation.kind == Kind::kBulkStore;
    return {operation.span.agent, epoch, &operation.know, Access::kWeak,
            is_bulk ? Proxy::kAsync : Proxy::kGeneric};
}

void AsyncEngine::read_source(Operation& operation) {
    const Memory& memory = machine->memory;
    DEEPCOMM_EMU_TRACE("copy reads %s", memory.describe(operation.src).c_str());
    machine->memory.check_copy_read(actor_of(operation, operation.span.read_epoch), operation.src,
                                    operation.num_bytes, &operation.defined);
    const char* source = memory.at(operation.src);
    operation.bytes.assign(source, source + operation.num_bytes);
    operation.is_read = true;
    if (operation.kind == Kind::kBulkStore) complete_store(operation, false);
    if (operation.kind == Kind::kRailPut && --operation.lane->num_unread == 0) {
        for (Thread* thread : flushing_) machine->scheduler.make_runnable(thread);
        flushing_.clear();
    }
    const bool is_counted =
        operation.kind == Kind::kRailPut && operation.counter != Memory::kOutside;
    if (is_counted) count_read(operation);  // last: it moves the operations
}

void AsyncEngine::land(Operation& operation) {
    if (operation.kind == Kind::kRailSignal || operation.kind == Kind::kRailCount) return;
    DEEPCOMM_EMU_TRACE("copy writes %s", machine->memory.describe(operation.dst).c_str());
    const Actor actor = actor_of(operation, operation.span.write_epoch);
    machine->memory.check_copy_write(actor, operation.dst, operation.defined);
    machine->strong.on_weak_write(actor, operation.dst, operation.num_bytes);
    std::memcpy(machine->memory.at(operation.dst), operation.bytes.data(), operation.num_bytes);
}

void AsyncEngine::complete(Operation& operation) {
    const AgentSpan& span = operation.span;
    switch (operation.kind) {
        case Kind::kBulkLoad: {
            Mbarrier& mbarrier = mbarriers_.at(operation.mbarrier);
            mbarrier.bytes -= operation.num_bytes;
            mbarrier.arriving.seen.raise(static_cast<size_t>(span.agent), span.write_epoch);
            --operation.block->num_loads_in_flight;
            flip_if_complete(mbarrier);
            return;
        }
        case Kind::kBulkStore: complete_store(operation, true); return;
        case Kind::kRailPut:
            operation.lane->landed[static_cast<size_t>(operation.num_puts_before)] = true;
            release_signals(*operation.lane);
            return;
        case Kind::kRailSignal: {
            Knowledge told;
            if (operation.tells_all) told.join(operation.know);
            for (int i = 0; i < operation.num_puts_before; ++i) {
                const AgentSpan& put = operation.lane->puts[static_cast<size_t>(i)];
                told.seen.raise(static_cast<size_t>(put.agent), put.write_epoch);
            }
            Actor actor = actor_of(operation, span.write_epoch);
            actor.access = Access::kStrongSys;
            machine->strong.agent_add(actor, operation.dst, operation.signal_value, told);
            return;
        }
        case Kind::kRailCount: {
            Knowledge told;
            told.seen.raise(static_cast<size_t>(operation.counted.agent),
                            operation.counted.read_epoch);
            Actor actor = actor_of(operation, span.write_epoch);
            actor.access = Access::kStrongSys;
            --operation.lane->num_uncounted;
            machine->strong.agent_add(actor, operation.dst, 1, told);
            return;
        }
    }
}

// ---- bulk copies

void AsyncEngine::bulk_load(Thread& me, size_t dst, size_t src, uint32_t num_bytes,
                            size_t mbarrier_offset) {
    check_bulk(me, src, dst, num_bytes);
    Mbarrier& mbarrier = find_mbarrier(me, mbarrier_offset);
    const bool is_init_proxied =
        mbarrier.is_published ||
        me.know.proxied[static_cast<size_t>(mbarrier.init_thread)] >= mbarrier.init_epoch;
    if (!is_init_proxied) {
        fail(
            "race: bulk copy completes on mbarrier %s, whose initialisation no "
            "fence_mbarrier_init has published",
            machine->memory.describe(mbarrier_offset).c_str());
    }
    DEEPCOMM_EMU_TRACE("bulk load of %u bytes: %s <- %s", num_bytes,
                       machine->memory.describe(dst).c_str(),
                       machine->memory.describe(src).c_str());
    mbarrier.issued_bytes += num_bytes;
    ++me.block->num_loads_in_flight;
    Operation operation = make(me, Kind::kBulkLoad, dst, src, num_bytes);
    operation.mbarrier = mbarrier_offset;
    submit(std::move(operation));
}

void AsyncEngine::bulk_store(Thread& me, size_t dst, size_t src, uint32_t num_bytes) {
    check_bulk(me, dst, src, num_bytes);
    DEEPCOMM_EMU_TRACE("bulk store of %u bytes: %s <- %s", num_bytes,
                       machine->memory.describe(dst).c_str(),
                       machine->memory.describe(src).c_str());
    Operation operation = make(me, Kind::kBulkStore, dst, src, num_bytes);
    operation.group = me.next_group;
    me.open_group.copies.push_back(operation.span);
    ++me.open_group.num_unread;
    ++me.open_group.num_unwritten;
    submit(std::move(operation));
}

void AsyncEngine::bulk_commit(Thread& me) {
    me.open_group.sequence = me.next_group++;
    DEEPCOMM_EMU_TRACE("bulk group %u committed", me.open_group.sequence);
    me.groups.push_back(std::move(me.open_group));
    me.open_group = {};
}

void AsyncEngine::complete_store(const Operation& operation, bool is_written) {
    Thread& issuer = *operation.issuer;
    BulkGroup* group = &issuer.open_group;
    for (BulkGroup& committed : issuer.groups) {
        if (committed.sequence == operation.group) group = &committed;
    }
    --(is_written ? group->num_unwritten : group->num_unread);
    if (issuer.is_bulk_waiting) machine->scheduler.make_runnable(&issuer);
}

bool AsyncEngine::is_satisfied(const Thread& me, uint32_t max_pending, bool reads_only) const {
    for (size_t i = 0; i + max_pending < me.groups.size(); ++i) {
        if (reads_only ? me.groups[i].num_unread : me.groups[i].num_unwritten) return false;
    }
    return true;
}

void AsyncEngine::bulk_wait(Thread& me, uint32_t max_pending, bool reads_only) {
    me.is_bulk_waiting = true;
    while (!is_satisfied(me, max_pending, reads_only)) {
        machine->scheduler.park_current("bulk copies", Memory::kOutside, kNever);
        machine->scheduler.switch_away();
    }
    me.is_bulk_waiting = false;
    DEEPCOMM_EMU_TRACE("bulk groups but %u %s", max_pending, reads_only ? "read" : "written");
    for (size_t i = 0; i + max_pending < me.groups.size(); ++i) {
        for (const AgentSpan& copy : me.groups[i].copies) {
            me.know.seen.raise(static_cast<size_t>(copy.agent),
                               reads_only ? copy.read_epoch : copy.write_epoch);
        }
    }
    if (reads_only) return;
    while (me.groups.size() > max_pending) me.groups.pop_front();
}

void AsyncEngine::check_exit(const Thread& me) const {
    int num_unread = me.open_group.num_unread;
    for (const BulkGroup& group : me.groups) num_unread += group.num_unread;
    if (num_unread) {
        fail("%s ends while %d of its bulk copies still read shared memory",
             machine->actor_name(me.id).c_str(), num_unread);
    }
    const Block& block = *me.block;
    if (block.num_live == 1 && block.num_loads_in_flight) {
        fail("r%d.b%d ends while %d bulk copies still write its shared memory", block.rank,
             block.block_idx, block.num_loads_in_flight);
    }
}

}  // namespace deepcomm::emu
