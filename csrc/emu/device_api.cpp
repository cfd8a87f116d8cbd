// SPDX-License-Identifier: Apache-2.0
// The instructions: each finds the running thread, gives others a turn where the model allows it,
// and hands over to the module that owns the meaning.
#include "emu/device_api.hpp"

#include <cstring>

#include "emu/machine.hpp"

namespace deepcomm::emu {

namespace {

/// Offset of a strong access, which must lie in emulated memory and be naturally aligned.
size_t require(const char* what, const void* address, int size) {
    const size_t offset = machine->memory.offset_of(address);
    if (offset == Memory::kOutside || offset % static_cast<size_t>(size)) {
        fail("%s of %d bytes by %s: %s", what, size, machine->actor_name(self().id).c_str(),
             offset == Memory::kOutside ? "not in the cluster's memory" : "misaligned");
    }
    return offset;
}

size_t require_inside(const char* what, const void* address) {
    const size_t offset = machine->memory.offset_of(address);
    if (offset == Memory::kOutside) fail("%s: address outside the cluster's memory", what);
    return offset;
}

/// Memory of the host has no messages: its strong operations race like others, and teach nothing.
void check_foreign(const Thread& me, size_t offset, int size, Access access, bool is_write) {
    const Actor actor = machine->actor(me, access);
    if (is_write) machine->memory.check_write(actor, offset, static_cast<size_t>(size));
    if (!is_write) machine->memory.check_read(actor, offset, static_cast<size_t>(size));
}

/// A strong operation is where threads switch: others run first, then it happens at once.
Thread& take_turn() {
    Thread& me = self();
    machine->scheduler.yield();
    return me;
}

}  // namespace

void strong_load(void* out, const void* address, int size, Order order, Scope scope) {
    Thread& me = take_turn();
    const size_t offset = require("load", address, size);
    if (Memory::is_foreign(offset)) {
        check_foreign(me, offset, size, strong_access(scope), false);
        std::memcpy(out, address, static_cast<size_t>(size));
        return;
    }
    machine->strong.load(me, out, offset, size, order, scope);
}

void strong_store(void* address, const void* value, int size, Order order, Scope scope) {
    Thread& me = take_turn();
    const size_t offset = require("store", address, size);
    if (Memory::is_foreign(offset)) {
        check_foreign(me, offset, size, strong_access(scope), true);
        std::memcpy(address, value, static_cast<size_t>(size));
        return;
    }
    StrongValue words;
    std::memcpy(&words, value, static_cast<size_t>(size));
    machine->strong.store(me, offset, size, words, order, scope);
}

uint64_t strong_rmw(void* address, int size, const RmwRequest& request, Order order, Scope scope) {
    Thread& me = take_turn();
    const size_t offset = require("atomic", address, size);
    if (Memory::is_foreign(offset)) {
        check_foreign(me, offset, size, strong_access(scope), true);
        uint64_t before = 0;
        std::memcpy(&before, address, static_cast<size_t>(size));
        const uint64_t after = apply(request, before);
        std::memcpy(address, &after, static_cast<size_t>(size));
        return before;
    }
    return machine->strong.rmw(me, offset, size, request, order, scope);
}

void fence_acq_rel(Scope scope) { machine->strong.fence_acq_rel(take_turn(), scope); }

void fence_sc(Scope scope) { machine->strong.fence_sc(take_turn(), scope); }

void fence_proxy_async() {
    Thread& me = take_turn();
    me.know.proxied = machine->publish(me).seen;  // a superset of what was proxied before
    DEEPCOMM_EMU_TRACE("fence.proxy.async");
}

// ---- plain accesses

/// Offset of a plain access worth checking: one by a thread, to memory that others see.
static bool find_plain(const void* address, size_t* offset) {
    if (!machine || !machine->current) return false;
    if (machine->memory.is_in_arena(address)) {
        *offset = machine->memory.offset_of(address);
        if (*offset == Memory::kOutside) fail("out of bounds: plain access behind all memory");
        return true;
    }
    const Stack& own = machine->current->context.stack;
    const char* byte = static_cast<const char*>(address);
    if (byte >= own.base && byte < own.base + own.num_bytes) return false;
    if (machine->stacks.contains(address)) {
        fail("%s touches a local variable of another thread",
             machine->actor_name(machine->current->id).c_str());
    }
    if (!machine->options.allow_foreign) return false;
    *offset = machine->memory.offset_of(address);
    if (*offset == Memory::kOutside) fail("wild pointer: %p is memory of nobody", address);
    return true;
}

void weak_read(const void* address, size_t num_bytes) {
    size_t offset;
    if (!find_plain(address, &offset)) return;
    const Thread& me = *machine->current;
    machine->memory.check_read(machine->actor(me, Access::kWeak), offset, num_bytes);
}

void weak_write(const void* address, size_t num_bytes) {
    size_t offset;
    if (!find_plain(address, &offset)) return;
    const Actor actor = machine->actor(*machine->current, Access::kWeak);
    machine->memory.check_write(actor, offset, num_bytes);
    machine->strong.on_weak_write(actor, offset, num_bytes);
}

// ---- time and control

uint64_t globaltimer_ns() { return machine->scheduler.now_ns(); }

void pause_on(const void* address, uint64_t deadline_ns, const void* other) {
    Thread& me = self();
    const size_t offset = require_inside("wait", address);
    if (Memory::is_foreign(offset)) fail("wait: address in memory of the host");
    const size_t beside = other == nullptr ? Memory::kOutside : require_inside("wait", other);
    const bool is_parked = machine->async.is_mbarrier(offset)
                               ? machine->async.park_on_mbarrier(me, offset, deadline_ns)
                               : machine->strong.park_on(me, offset, beside, deadline_ns);
    if (is_parked) machine->scheduler.switch_away();
}

void sleep_ns(uint64_t duration_ns) {
    machine->scheduler.park_current("time", Memory::kOutside,
                                    machine->scheduler.now_ns() + duration_ns);
    machine->scheduler.switch_away();
}

void exit_thread() {
    machine->finish_current();
    __builtin_unreachable();
}

// ---- shared memory, mbarriers, bulk copies

void* shared_memory(size_t num_bytes) {
    const Block& block = *self().block;
    if (num_bytes > block.smem_bytes) {
        fail("shared storage of %zu bytes is asked, %zu are launched", num_bytes, block.smem_bytes);
    }
    return machine->memory.at(block.smem_offset);
}

void mbarrier_init(void* mbarrier, uint32_t num_arrivals) {
    Thread& me = take_turn();
    machine->async.mbarrier_init(me, require_inside("mbarrier_init", mbarrier), num_arrivals);
}

void fence_mbarrier_init() { machine->async.fence_mbarrier_init(take_turn()); }

void mbarrier_arrive(void* mbarrier, uint32_t expected_bytes) {
    Thread& me = take_turn();
    machine->async.mbarrier_arrive(me, require_inside("mbarrier_arrive", mbarrier), expected_bytes);
}

bool mbarrier_try_wait(void* mbarrier, uint32_t parity) {
    Thread& me = take_turn();
    return machine->async.mbarrier_try_wait(me, require_inside("mbarrier_wait", mbarrier), parity);
}

void bulk_load(void* shared_dst, const void* global_src, uint32_t num_bytes, void* mbarrier) {
    Thread& me = take_turn();
    machine->async.bulk_load(me, require_inside("bulk_load", shared_dst),
                             require_inside("bulk_load", global_src), num_bytes,
                             require_inside("bulk_load", mbarrier));
}

void bulk_store(void* global_dst, const void* shared_src, uint32_t num_bytes) {
    Thread& me = take_turn();
    machine->async.bulk_store(me, require_inside("bulk_store", global_dst),
                              require_inside("bulk_store", shared_src), num_bytes);
}

void bulk_commit() { machine->async.bulk_commit(take_turn()); }

void bulk_wait(uint32_t max_pending, bool reads_only) {
    machine->async.bulk_wait(take_turn(), max_pending, reads_only);
}

// ---- rails

void rail_put(RailPeer peer, void* dst, const void* src, uint32_t num_bytes) {
    Thread& me = take_turn();
    machine->async.rail_put(me, peer, require_inside("rail_put", dst),
                            require_inside("rail_put", src), num_bytes);
}

void rail_signal_add(RailPeer peer, uint64_t* word, uint64_t value) {
    Thread& me = take_turn();
    machine->async.rail_signal_add(me, peer, require("rail_signal", word, 8), value);
}

void rail_put_counted(RailPeer peer, void* dst, const void* src, uint32_t num_bytes,
                      uint64_t* counter) {
    Thread& me = take_turn();
    machine->async.rail_put(me, peer, require_inside("rail_put", dst),
                            require_inside("rail_put", src), num_bytes,
                            require("rail_counter", counter, 8));
}

void rail_signal_add_told(RailPeer peer, uint64_t* word, uint64_t value) {
    Thread& me = take_turn();
    machine->async.rail_signal_add(me, peer, require("rail_signal", word, 8), value, true);
}

void rail_flush(int context) { machine->async.rail_flush(take_turn(), context); }

}  // namespace deepcomm::emu
