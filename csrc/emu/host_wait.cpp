// SPDX-License-Identifier: Apache-2.0
// Runs kernels for hosts that go on while they run: up to the moment at which one host's wait is
// over. Threads of unfinished kernels stay where they are until the next call.
#include <algorithm>

#include "emu/machine.hpp"

namespace deepcomm::emu {

bool Machine::is_over(int rank, const HostWait& wait) const {
    if (scheduler.is_stopped(rank)) return false;  // with its host
    switch (wait.kind) {
        case HostWait::Kind::kNone: return false;
        case HostWait::Kind::kStream: return ranks[static_cast<size_t>(rank)].program.empty();
        case HostWait::Kind::kWord: break;
    }
    return *wait.word == wait.expected || *wait.flag == wait.flag_value ||
           scheduler.now_ns() >= wait.deadline_ns;
}

/// The host goes on to read what the word or flag that it has seen stands for: the whole region
/// around it, all of which must be known by then.
void Machine::observe(int rank_idx, const HostWait& wait) {
    Rank& rank = ranks[static_cast<size_t>(rank_idx)];
    if (wait.kind == HostWait::Kind::kStream) {
        rank.host_know.join(rank.know);
        return;
    }
    const bool is_word = *wait.word == wait.expected;
    if (!is_word && *wait.flag != wait.flag_value) return;
    const void* seen = is_word ? static_cast<const void*>(wait.word) : wait.flag;
    const size_t offset = memory.offset_of(seen);
    strong.teach_host(offset, &rank.host_know);
    memory.check_host_read_of_region(rank.host_know, offset);
}

bool Machine::find_over(const std::vector<HostWait>& waits, std::vector<char>* over) const {
    over->assign(waits.size(), 0);
    for (size_t rank = 0; rank < waits.size(); ++rank) {
        (*over)[rank] = is_over(static_cast<int>(rank), waits[rank]);
    }
    return std::any_of(over->begin(), over->end(), [](char flag) { return flag != 0; });
}

/// A host of an injected stop stays in its wait; that is no deadlock of the others.
bool Machine::only_stopped_wait(const std::vector<HostWait>& waits) const {
    for (size_t rank = 0; rank < waits.size(); ++rank) {
        const bool is_stopped = static_cast<int>(rank) == options.faults.stop_rank;
        if (!is_stopped && waits[rank].kind != HostWait::Kind::kNone) return false;
    }
    return true;
}

/// The next time at which a host's wait is over; those that have come are over already.
uint64_t Machine::next_deadline(const std::vector<HostWait>& waits) const {
    uint64_t deadline_ns = kNever;
    for (size_t rank = 0; rank < waits.size(); ++rank) {
        const bool stops = static_cast<int>(rank) == options.faults.stop_rank;
        const uint64_t end_ns = stops ? options.faults.stop_at_ns : kNever;
        const uint64_t its_ns = waits[rank].deadline_ns;
        if (its_ns > scheduler.now_ns() && its_ns < end_ns) {
            deadline_ns = std::min(deadline_ns, its_ns);
        }
    }
    return deadline_ns;
}

std::string Machine::run_until_any(const std::vector<HostWait>& waits, std::vector<char>* over) {
    strong.take_host_writes();
    // Some hosts go on at once, beside their peers' kernels; others come late, after all of them.
    const bool is_late = random.one_in(2);
    bool is_any_over = false;
    try {
        do {
            while (start_ready_launches()) {
            }
            is_any_over = find_over(waits, over);
            scheduler.set_host_deadline(next_deadline(waits));
            if (is_any_over && (!is_late || scheduler.is_idle())) break;
            scheduler.set_stop_when_idle(is_any_over);
        } while (scheduler.run_from_host() && error.empty());
        for (size_t rank = 0; error.empty() && rank < waits.size(); ++rank) {
            if ((*over)[rank]) observe(static_cast<int>(rank), waits[rank]);
        }
    } catch (const HostFailure&) {
        current = nullptr;
    }
    scheduler.set_stop_when_idle(false);
    scheduler.set_host_deadline(kNever);
    if (error.empty() && !is_any_over && !only_stopped_wait(waits)) error = describe_deadlock();
    return error;
}

}  // namespace deepcomm::emu
