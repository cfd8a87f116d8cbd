// SPDX-License-Identifier: Apache-2.0
// Runs named cases over ranges of seeds: the common main of every emulated test program.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "emu/cluster.hpp"

namespace deepcomm::testing {

/// What the command line asks of the cases.
struct Settings {
    emu::Options options;
    uint64_t timeout_ns = 1'000'000'000;  ///< of each bounded wait, in virtual time
};

const Settings& settings();

/// Sets up a cluster, runs it and checks the results; returns what went wrong, or nothing.
using CaseBody = std::function<std::string(emu::Cluster&)>;

struct Case {
    std::string name;
    int num_ranks;
    CaseBody body;
};

/// Adds a case; to be called by a static object's constructor.
struct Register {
    Register(const char* name, int num_ranks, CaseBody body);
};

/// Counts an outcome of this seed; the counts over all seeds are printed with the result.
void note(const char* outcome);

std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));

/// Compares two words, for messages like "sum[3]: expected 7, got 9".
#define DEEPCOMM_EXPECT(what, index, expected, got)                                         \
    do {                                                                                    \
        const uint64_t expected_value = (expected), got_value = (got);                      \
        if (expected_value != got_value) {                                                  \
            return ::deepcomm::testing::format(                                             \
                "wrong data: %s[%d]: expected %zu, got %zu", what, static_cast<int>(index), \
                static_cast<size_t>(expected_value), static_cast<size_t>(got_value));       \
        }                                                                                   \
    } while (false)

}  // namespace deepcomm::testing

/// The mutant that is switched on; 0: none. Programs built from mutated sources ask for it.
bool deepcomm_mutant(int mutant);
