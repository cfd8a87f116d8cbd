// SPDX-License-Identifier: Apache-2.0
#include "emu/cluster.hpp"

#include "emu/machine.hpp"

namespace deepcomm::emu {

Cluster::Cluster(int num_ranks, uint64_t seed, const Options& options) : num_ranks_(num_ranks) {
    static Machine the_machine;  // its tables and stacks are reused by every seed
    machine = &the_machine;
    machine->reset(num_ranks, seed, options);
}

void* Cluster::alloc_bytes(int rank, const char* name, size_t num_bytes, Fill fill) {
    return machine->memory.at(machine->memory.alloc(rank, name, num_bytes, fill == Fill::kZero));
}

void Cluster::free_bytes(void* begin) { machine->free_later(machine->memory.offset_of(begin)); }

void Cluster::define(const void* begin, size_t num_bytes) {
    const size_t offset = machine->memory.offset_of(begin);
    machine->memory.check_bounds("define", offset, num_bytes);
    machine->memory.define(offset, num_bytes);
}

void Cluster::launch(int rank, Launch launch) { machine->launch(rank, std::move(launch)); }

void Cluster::host_barrier() {
    for (Rank& rank : machine->ranks) rank.program.push_back({true, {0, 0, 0, nullptr}});
}

std::string Cluster::run() { return machine->run(); }

std::string Cluster::run_until_any(const std::vector<HostWait>& waits, std::vector<char>* over) {
    return machine->run_until_any(waits, over);
}

std::string Cluster::observe(int rank, const HostWait& wait) {
    try {
        machine->observe(rank, wait);
    } catch (const HostFailure&) {
    }
    return machine->error;
}

std::string Cluster::host_read(int rank, const void* begin, size_t num_bytes) {
    const Rank& reader = machine->ranks[static_cast<size_t>(rank)];
    try {
        machine->memory.check_host_read(reader.host_know, machine->memory.offset_of(begin),
                                        num_bytes);
    } catch (const HostFailure&) {
    }
    return machine->error;
}

Statistics Cluster::statistics() const {
    const Scheduler& scheduler = machine->scheduler;
    return {scheduler.num_steps(), scheduler.num_switches(), scheduler.now_ns(),
            scheduler.trace_hash(), static_cast<int>(machine->threads.size())};
}

}  // namespace deepcomm::emu
