// SPDX-License-Identifier: Apache-2.0
// The rails of AsyncEngine: puts in any order, signals behind the puts of their lane.
#include <algorithm>

#include "emu/machine.hpp"

namespace deepcomm::emu {

AsyncEngine::Lane& AsyncEngine::lane(const Thread& me, RailPeer peer) {
    return lanes_[{me.rank, {peer.context, peer.rank}}];
}

void AsyncEngine::rail_put(Thread& me, RailPeer peer, size_t dst, size_t src, uint32_t num_bytes,
                           size_t counter) {
    machine->memory.check_bounds("rail put", src, num_bytes);
    machine->memory.check_bounds("rail put", dst, num_bytes);
    Operation operation = make(me, Kind::kRailPut, dst, src, num_bytes);
    Lane& to = lane(me, peer);
    operation.lane = &to;
    operation.num_puts_before = to.num_issued++;
    to.landed.push_back(false);
    to.puts.push_back(operation.span);
    const auto id = static_cast<size_t>(me.id);
    to.issuers.emplace_back(me.id, operation.know.seen[id]);
    ++to.num_unread;
    operation.counter = counter;
    if (counter != Memory::kOutside && ++to.num_uncounted > kMostCountedPuts) {
        fail("rail put: more than %d to rank %d are uncounted: a proxy would let it wait for ever",
             kMostCountedPuts, peer.rank);
    }
    submit(std::move(operation));
}

/// The network tells its issuer that a source has been read, some time later.
void AsyncEngine::count_read(const Operation& put) {
    Operation count = put;
    count.kind = Kind::kRailCount;
    count.span = take_agent(*put.issuer);
    count.counted = put.span;
    count.dst = count.src = put.counter;
    count.num_bytes = 8;
    submit(std::move(count));
}

/// A mapped peer's rail releases what the signalling thread knows of, not what a network has queued.
void AsyncEngine::check_follows(const Thread& me, const Lane& lane) {
    for (const auto& [id, epoch] : lane.issuers) {
        if (id == me.id || me.know.seen[static_cast<size_t>(id)] >= epoch) continue;
        fail("race: rail signal of %s is unordered with a put of %s that it stands for",
             machine->actor_name(me.id).c_str(), machine->actor_name(id).c_str());
    }
}

void AsyncEngine::rail_signal_add(Thread& me, RailPeer peer, size_t word, uint64_t value,
                                  bool tells_all) {
    machine->memory.check_bounds("rail signal", word, 8);
    Operation operation = make(me, Kind::kRailSignal, word, word, 8);
    Lane& to = lane(me, peer);
    check_follows(me, to);
    operation.lane = &to;
    operation.signal_value = value;
    operation.tells_all = tells_all;
    operation.num_puts_before = to.num_issued;
    if (to.num_landed_in_order >= to.num_issued) {
        submit(std::move(operation));
    } else {
        ++machine->ranks[static_cast<size_t>(operation.rank)].num_copies;
        held_.push_back(std::move(operation));
    }
}

void AsyncEngine::release_signals(Lane& lane) {
    while (lane.num_landed_in_order < lane.num_issued &&
           lane.landed[static_cast<size_t>(lane.num_landed_in_order)]) {
        ++lane.num_landed_in_order;
    }
    for (size_t i = 0; i < held_.size();) {
        Operation& signal = held_[i];
        if (signal.lane != &lane || signal.num_puts_before > lane.num_landed_in_order) {
            ++i;
            continue;
        }
        --machine->ranks[static_cast<size_t>(signal.rank)].num_copies;
        submit(std::move(signal));
        held_.erase(held_.begin() + static_cast<long>(i));
    }
}

void AsyncEngine::rail_flush(Thread& me, int context) {
    const auto is_clear = [&] {
        return std::none_of(lanes_.begin(), lanes_.end(), [&](const auto& entry) {
            return entry.first.first == me.rank && entry.first.second.first == context &&
                   entry.second.num_unread > 0;
        });
    };
    while (!is_clear()) {
        flushing_.push_back(&me);
        machine->scheduler.park_current("rail flush", Memory::kOutside, kNever);
        machine->scheduler.switch_away();
    }
    for (const auto& entry : lanes_) {
        if (entry.first.first != me.rank || entry.first.second.first != context) continue;
        for (const AgentSpan& put : entry.second.puts) {
            me.know.seen.raise(static_cast<size_t>(put.agent), put.read_epoch);
        }
    }
}

}  // namespace deepcomm::emu
