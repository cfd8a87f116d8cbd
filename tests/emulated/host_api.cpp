// SPDX-License-Identifier: Apache-2.0
// The emulator as a library for runtime.py: one cluster at a time, errors as text. Callers take
// turns; what a kernel does is in libraries of their own, which call deepcomm::emu in this one.
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "emu/cluster.hpp"

using namespace deepcomm::emu;

namespace {

std::optional<Cluster> cluster;
std::string message;
int mutant = 0;

/// A kernel and what to launch it with.
struct KernelLaunch {
    int grid;
    int block;
    size_t smem_bytes;
    void (*kernel)(const void* params);
    const void* params;
    size_t num_bytes;
};

/// Runs a call that may fail on the host's side; null or what went wrong.
template <typename Call>
const char* catching(Call&& call) {
    try {
        message = call();
    } catch (const std::runtime_error& error) {
        message = error.what();
    }
    return message.empty() ? nullptr : message.c_str();
}

}  // namespace

/// Which broken line of mutated sources is on (see mutants.py).
bool deepcomm_mutant(int number) { return number == mutant; }

extern "C" {

void deepcomm_set_mutant(int number) { mutant = number; }

void deepcomm_open(int num_ranks, uint64_t seed, const Options* options) {
    cluster.emplace(num_ranks, seed, *options);
}

/// Zeroed memory of a rank, or of the host with rank -1.
const char* deepcomm_alloc(int rank, const char* name, size_t num_bytes, void** begin) {
    return catching([&] {
        *begin = cluster->alloc_bytes(rank, name, num_bytes, Fill::kZero);
        return "";
    });
}

void deepcomm_free(void* begin) { cluster->free_bytes(begin); }

/// Queues a kernel with a copy of its arguments.
void deepcomm_launch(int rank, const KernelLaunch* launch) {
    const auto copy = std::make_shared<std::vector<char>>(launch->num_bytes);
    std::memcpy(copy->data(), launch->params, launch->num_bytes);
    const auto kernel = launch->kernel;
    cluster->launch(rank, {launch->grid, launch->block, launch->smem_bytes,
                           [copy, kernel] { kernel(copy->data()); }});
}

const char* deepcomm_run(const HostWait* waits, char* over) {
    return catching([&] {
        const auto count = static_cast<size_t>(cluster->num_ranks());
        std::vector<char> is_over;
        std::string error = cluster->run_until_any({waits, waits + count}, &is_over);
        std::memcpy(over, is_over.data(), is_over.size());
        return error;
    });
}

const char* deepcomm_observe(int rank, const HostWait* wait) {
    return catching([&] { return cluster->observe(rank, *wait); });
}

const char* deepcomm_host_read(int rank, const void* begin, size_t num_bytes) {
    return catching([&] { return cluster->host_read(rank, begin, num_bytes); });
}

void deepcomm_statistics(Statistics* statistics) { *statistics = cluster->statistics(); }

}  // extern "C"
