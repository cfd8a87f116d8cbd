// SPDX-License-Identifier: Apache-2.0
#include "emu/strong.hpp"

#include <algorithm>
#include <cstring>
#include <iterator>

#include "emu/machine.hpp"

namespace deepcomm::emu {

namespace {

constexpr size_t kWord = 4;

bool acquires(Order order) { return order == Order::kAcquire || order == Order::kAcqRel; }

bool releases(Order order) { return order == Order::kRelease || order == Order::kAcqRel; }

size_t index_of(Scope scope) { return static_cast<size_t>(scope); }

}  // namespace

uint64_t apply(const RmwRequest& request, uint64_t old_value) {
    switch (request.op) {
        case Rmw::kAdd: return old_value + request.operand;
        case Rmw::kExchange: return request.operand;
        case Rmw::kOr: return old_value | request.operand;
        case Rmw::kCompareSwap: return old_value == request.expected ? request.operand : old_value;
    }
    return old_value;
}

void StrongMemory::reset() {
    locations_.clear();
    location_of_.assign(machine->memory.num_used() / kWord, 0);
    fence_order_sys_ = {};
    fence_order_rank_.assign(machine->ranks.size(), {});
}

// ---- locations

Location& StrongMemory::locate(size_t offset, int size) {
    const size_t first_word = offset / kWord;
    const size_t num_words = static_cast<size_t>(size) / kWord;
    if (location_of_.size() < first_word + num_words) {
        location_of_.resize(machine->memory.num_used() / kWord, 0);
    }
    const int known = location_of_[first_word];
    if (known == 0) {
        for (size_t i = 0; i < num_words; ++i) {
            if (location_of_[first_word + i]) break;  // caught below as a change of size
            location_of_[first_word + i] = static_cast<int>(locations_.size()) + 1;
        }
        Location fresh{};
        fresh.offset = offset;
        fresh.size = size;
        fresh.is_hosts = machine->memory.rank_of(offset) == kHostRank;
        fresh.messages.emplace_back();
        std::memcpy(&fresh.messages[0].value, machine->memory.at(offset),
                    static_cast<size_t>(size));
        locations_.push_back(std::move(fresh));
    }
    Location& location = locations_[static_cast<size_t>(location_of_[first_word]) - 1];
    const bool overlaps_another =
        location_of_[first_word + num_words - 1] != location_of_[first_word];
    if (location.offset != offset || location.size != size || overlaps_another) {
        fail("mixed sizes: %s is accessed strongly as %d bytes at %s and as %d bytes",
             machine->memory.describe(offset).c_str(), location.size,
             machine->memory.describe(location.offset).c_str(), size);
    }
    absorb_weak_write(location);
    return location;
}

/// A plain write reaches the hook before its value reaches memory, so it becomes a message at the
/// next strong operation. Being free of races, it comes after all messages so far.
void StrongMemory::absorb_weak_write(Location& location) {
    if (!location.has_weak_write) return;
    location.has_weak_write = false;
    Message message;
    std::memcpy(&message.value, machine->memory.at(location.offset),
                static_cast<size_t>(location.size));
    message.writer = location.weak_writer;
    message.epoch = location.weak_epoch;
    location.messages.push_back(std::move(message));
}

void StrongMemory::on_weak_write(const Actor& actor, size_t offset, size_t num_bytes) {
    const size_t last_word = (offset + num_bytes - 1) / kWord;
    for (size_t word = offset / kWord; word <= last_word && word < location_of_.size(); ++word) {
        if (!location_of_[word]) continue;
        Location& location = locations_[static_cast<size_t>(location_of_[word]) - 1];
        location.has_weak_write = true;
        location.weak_writer = actor.id;
        location.weak_epoch = actor.epoch;
    }
}

// ---- loads

/// Coherence: nothing older than the newest message known to have happened, or read before.
size_t StrongMemory::oldest_readable(const Thread& me, const Location& location) const {
    size_t index = location.messages.size() - 1;
    const size_t viewed = location.view < 0 ? 0 : me.know.seen[static_cast<size_t>(location.view)];
    while (index > viewed) {
        const Message& message = location.messages[index];
        const bool is_known = message.writer < 0 || message.writer == me.id ||
                              me.know.seen[static_cast<size_t>(message.writer)] >= message.epoch;
        if (is_known) break;
        --index;
    }
    return index;
}

/// The newest message that a slow link has let through to this reader.
size_t StrongMemory::newest_visible(const Thread& me, const Location& location) {
    const uint64_t now = machine->scheduler.now_ns();
    size_t index = location.messages.size() - 1;
    while (index > 0) {
        const Message& message = location.messages[index];
        if (message.visible_ns <= now || machine->rank_of_actor(message.writer) == me.rank) break;
        --index;
    }
    return index;
}

int& StrongMemory::stale_reads(const Thread& me, Location& location) {
    for (StaleReads& entry : location.stale) {
        if (entry.thread == me.id) return entry.count;
    }
    location.stale.push_back({me.id, 0});
    return location.stale.back().count;
}

static void remember_read(Thread& me, const RecentRead& read) {
    for (RecentRead& recent : me.recent_reads) {
        if (recent.offset == read.offset) {
            recent = read;
            return;
        }
    }
    me.recent_reads[me.next_recent_read++ % std::size(me.recent_reads)] = read;
}

size_t StrongMemory::choose(Thread& me, Location& location) {
    const size_t oldest = oldest_readable(me, location);
    const size_t visible = std::max(oldest, newest_visible(me, location));
    size_t chosen = visible;
    if (oldest < visible) {
        int& count = stale_reads(me, location);
        if (count < kMaxStaleReads && machine->random.one_in(2)) {
            chosen = oldest + machine->random.below(static_cast<uint32_t>(visible - oldest + 1));
        }
        count = chosen < visible ? count + 1 : 0;
    }
    remember_read(me, {location.offset, chosen});
    return chosen;
}

/// Reading a message that the reader would not know otherwise bounds its later reads, and those of
/// whoever it tells.
void StrongMemory::remember_view(Thread& me, Location& location, size_t index) {
    const Message& message = location.messages[index];
    if (message.writer < 0 || message.writer == me.id) return;
    if (me.know.seen[static_cast<size_t>(message.writer)] >= message.epoch) return;
    if (location.view < 0) {
        location.view = machine->new_clock_entry();
    }
    me.know.seen.raise(static_cast<size_t>(location.view), static_cast<uint32_t>(index));
}

/// Synchronisation: release and acquire must include each other by scope. A relaxed load keeps what
/// it read for a later fence whose scope reaches the writer.
void StrongMemory::learn(Thread& me, const Message& message, Order order, Scope scope) {
    if (message.writer < 0) return;
    const Machine& all = *machine;
    if (!all.includes(message.scope, message.writer, me.id)) return;
    if (!all.includes(scope, me.id, message.writer)) return;
    for (int release = 0; release < kNumScopes; ++release) {
        const Knowledge& told = message.released[release];
        if (told.is_zero()) continue;
        if (!all.includes(static_cast<Scope>(release), message.writer, me.id)) continue;
        if (acquires(order)) {
            me.know.join(told);
            continue;
        }
        int needed = 0;
        while (!all.includes(static_cast<Scope>(needed), me.id, message.writer)) ++needed;
        me.unfenced[needed].join(told);
    }
}

void StrongMemory::load(Thread& me, void* out, size_t offset, int size, Order order, Scope scope) {
    machine->memory.check_read(machine->actor(me, strong_access(scope)), offset,
                               static_cast<size_t>(size));
    Location& location = locate(offset, size);
    const size_t index = choose(me, location);
    const Message& message = location.messages[index];
    remember_view(me, location, index);
    learn(me, message, order, scope);
    std::memcpy(out, &message.value, static_cast<size_t>(size));
    machine->scheduler.note(index + 1);
    DEEPCOMM_EMU_TRACE("load %s -> 0x%zx (message %zu of %zu)",
                       machine->memory.describe(offset).c_str(), message.value.words[0], index,
                       location.messages.size() - 1);
}

// ---- stores and read-modify-writes

/// A relaxed store passes on what fences before it published.
void StrongMemory::tell_fences(Thread& me, Message& message, Scope scope) {
    for (int fence = 0; fence < kNumScopes; ++fence) {
        if (me.fenced[fence].is_zero()) continue;
        message.released[std::min<size_t>(index_of(scope), static_cast<size_t>(fence))].join(
            me.fenced[fence]);
    }
}

void StrongMemory::push(Location& location, Message message) {
    const Faults& faults = machine->options.faults;
    if (faults.slow_src >= 0 && machine->rank_of_actor(message.writer) == faults.slow_src &&
        machine->memory.rank_of(location.offset) == faults.slow_dst) {
        message.visible_ns = machine->scheduler.now_ns() + faults.slow_extra_ns;
    }
    std::memcpy(machine->memory.at(location.offset), &message.value,
                static_cast<size_t>(location.size));
    DEEPCOMM_EMU_TRACE("write %s <- 0x%zx (message %zu)",
                       machine->memory.describe(location.offset).c_str(), message.value.words[0],
                       location.messages.size());
    location.messages.push_back(std::move(message));
    for (Thread* waiter : location.waiters) {
        const Wait& wait = waiter->wait;
        const bool is_awaited = wait.offset == location.offset || wait.other == location.offset;
        if (is_awaited) machine->scheduler.make_runnable(waiter);
    }
    location.waiters.clear();
    machine->scheduler.note_progress();
    if (location.is_hosts) machine->scheduler.request_host();
}

void StrongMemory::append(Thread& me, Location& location, Message message, Order order,
                          Scope scope) {
    message.writer = me.id;
    message.epoch = me.epoch;
    message.scope = scope;
    if (releases(order)) {
        message.released[index_of(scope)].join(machine->publish(me));
    } else {
        tell_fences(me, message, scope);
    }
    push(location, std::move(message));
}

void StrongMemory::store(Thread& me, size_t offset, int size, const StrongValue& value, Order order,
                         Scope scope) {
    Location& location = locate(offset, size);
    machine->memory.check_write(machine->actor(me, strong_access(scope)), offset,
                                static_cast<size_t>(size));
    Message message;
    message.value = value;
    append(me, location, std::move(message), order, scope);
}

/// Reads the newest message and continues its release sequence.
uint64_t StrongMemory::rmw(Thread& me, size_t offset, int size, const RmwRequest& request,
                           Order order, Scope scope) {
    const Actor actor = machine->actor(me, strong_access(scope));
    machine->memory.check_read(actor, offset, static_cast<size_t>(size));
    Location& location = locate(offset, size);
    machine->memory.check_write(actor, offset, static_cast<size_t>(size));
    const Message& newest = location.messages.back();
    learn(me, newest, order, scope);
    Message message;
    const uint64_t old_value = newest.value.words[0];
    const uint64_t mask = size == 8 ? ~uint64_t{0} : 0xFFFFFFFFull;
    message.value.words[0] = apply(request, old_value) & mask;
    const bool continues = newest.writer >= 0 &&
                           machine->includes(newest.scope, newest.writer, me.id) &&
                           machine->includes(scope, me.id, newest.writer);
    for (int release = 0; continues && release < kNumScopes; ++release) {
        message.released[release].join(newest.released[release]);
    }
    append(me, location, std::move(message), order, scope);
    return old_value;
}

void StrongMemory::agent_add(const Actor& agent, size_t offset, uint64_t value,
                             const Knowledge& released) {
    Location& location = locate(offset, 8);
    machine->memory.check_write(agent, offset, 8);
    const Message& newest = location.messages.back();
    Message message;
    message.value.words[0] = newest.value.words[0] + value;
    for (int release = 0; release < kNumScopes; ++release) {
        message.released[release].join(newest.released[release]);
    }
    message.writer = agent.id;
    message.epoch = agent.epoch;
    message.released[index_of(Scope::kSys)].join(released);
    push(location, std::move(message));
}

// ---- fences

void StrongMemory::fence_acq_rel(Thread& me, Scope scope) {
    for (int needed = 0; needed <= static_cast<int>(scope); ++needed) {
        me.know.join(me.unfenced[needed]);
        me.unfenced[needed] = {};
    }
    me.fenced[index_of(scope)] = machine->publish(me);
    DEEPCOMM_EMU_TRACE("fence.acq_rel");
}

/// Fences of one order also tell each other, in the order in which they run.
void StrongMemory::fence_sc(Thread& me, Scope scope) {
    Knowledge& of_rank = fence_order_rank_[static_cast<size_t>(me.rank)];
    me.know.join(of_rank);
    if (scope == Scope::kSys) me.know.join(fence_order_sys_);
    fence_acq_rel(me, scope);
    of_rank.join(me.fenced[index_of(scope)]);
    if (scope == Scope::kSys) fence_order_sys_.join(me.fenced[index_of(scope)]);
}

void StrongMemory::teach_host(size_t offset, Knowledge* know) const {
    const size_t word = offset / kWord;
    if (word >= location_of_.size() || !location_of_[word]) return;
    const Location& location = locations_[static_cast<size_t>(location_of_[word]) - 1];
    const Message& newest = location.messages.back();
    if (newest.scope == Scope::kSys) know->join(newest.released[index_of(Scope::kSys)]);
}

void StrongMemory::take_host_writes() {
    for (Location& location : locations_) {
        if (!location.is_hosts) continue;
        absorb_weak_write(location);
        const auto size = static_cast<size_t>(location.size);
        const char* bytes = machine->memory.at(location.offset);
        if (std::memcmp(bytes, &location.messages.back().value, size) == 0) continue;
        machine->memory.take_host_write(location.offset, size);
        Message message;
        std::memcpy(&message.value, bytes, size);
        push(location, std::move(message));
    }
}

// ---- waiting

/// A location whose last load by a thread saw all that it can see for now; until_ns: as long as that is
/// so, if nobody writes. nullptr: there is more to see.
Location* StrongMemory::seen(const Thread& me, size_t offset, uint64_t* until_ns) {
    const size_t word = offset / kWord;
    if (word >= location_of_.size() || !location_of_[word]) return nullptr;
    Location& location = locations_[static_cast<size_t>(location_of_[word]) - 1];
    for (const RecentRead& recent : me.recent_reads) {
        if (recent.offset != location.offset) continue;
        const size_t visible = newest_visible(me, location);
        if (recent.index < visible) return nullptr;
        const bool is_newest = visible + 1 == location.messages.size();
        if (!is_newest) *until_ns = std::min(*until_ns, location.messages[visible + 1].visible_ns);
        return &location;
    }
    return nullptr;
}

/// A thread parks only if it has seen all of what it polls; other: or kOutside.
bool StrongMemory::park_on(Thread& me, size_t offset, size_t other, uint64_t deadline_ns) {
    Location* location = seen(me, offset, &deadline_ns);
    Location* beside = other == Memory::kOutside ? location : seen(me, other, &deadline_ns);
    if (location == nullptr || beside == nullptr) return false;
    location->waiters.push_back(&me);
    if (beside != location) beside->waiters.push_back(&me);
    machine->scheduler.park_current("word", location->offset, deadline_ns);
    me.wait.other = beside->offset;
    return true;
}

}  // namespace deepcomm::emu
