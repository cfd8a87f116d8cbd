// SPDX-License-Identifier: Apache-2.0
#include "harness.hpp"

#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

namespace deepcomm::testing {

namespace {

struct Arguments {
    std::string program;
    std::string name;
    uint64_t first_seed = 0;
    uint64_t end_seed = 100;
    int mutant = 0;
    bool until_failure = false;
    Settings settings;
    std::string replay;  ///< the arguments that do not depend on the seed
};

Arguments arguments;
std::map<std::string, uint64_t> notes;

std::vector<Case>& cases() {
    static std::vector<Case> all;
    return all;
}

std::string escape(const std::string& text) {
    std::string escaped;
    for (const char c : text) {
        if (c == '"' || c == '\\') escaped += '\\';
        escaped += c == '\n' ? std::string("\\n") : std::string(1, c);
    }
    return escaped;
}

[[noreturn]] void usage(const char* problem) {
    std::fprintf(stderr,
                 "%s\nusage: --list | CASE [--seeds A:B] [--until-failure] [--mutant N] [--trace]\n"
                 "  [--timeout-ns N] [--stop-rank R@NS] [--delay-rank R@NS+NS]\n"
                 "  [--slow-link SRC-DST+NS]\n",
                 problem);
    std::exit(2);
}

void scan(const char* text, const char* pattern, int expected, ...) {
    std::va_list args;
    va_start(args, expected);
    const int found = std::vsscanf(text, pattern, args);
    va_end(args);
    if (found != expected) usage(text);
}

void parse_option(const std::string& option, const char* value) {
    emu::Faults& faults = arguments.settings.options.faults;
    if (option == "--seeds") {
        scan(value, "%lu:%lu", 2, &arguments.first_seed, &arguments.end_seed);
        return;
    }
    arguments.replay += " " + option + " " + value;
    if (option == "--mutant") {
        scan(value, "%d", 1, &arguments.mutant);
    } else if (option == "--timeout-ns") {
        scan(value, "%lu", 1, &arguments.settings.timeout_ns);
    } else if (option == "--stop-rank") {
        scan(value, "%d@%lu", 2, &faults.stop_rank, &faults.stop_at_ns);
    } else if (option == "--delay-rank") {
        scan(value, "%d@%lu+%lu", 3, &faults.delay_rank, &faults.delay_from_ns,
             &faults.delay_for_ns);
    } else if (option == "--slow-link") {
        scan(value, "%d-%d+%lu", 3, &faults.slow_src, &faults.slow_dst, &faults.slow_extra_ns);
    } else {
        usage(option.c_str());
    }
}

void parse(int argc, char** argv) {
    arguments.program = argv[0];
    if (argc < 2) usage("no case named");
    arguments.name = argv[1];
    for (int i = 2; i < argc; ++i) {
        const std::string option = argv[i];
        if (option == "--trace") {
            arguments.settings.options.trace = true;
        } else if (option == "--until-failure") {
            arguments.until_failure = true;
        } else if (i + 1 < argc) {
            parse_option(option, argv[++i]);
        } else {
            usage(option.c_str());
        }
    }
}

struct Tally {
    uint64_t num_seeds = 0;
    uint64_t num_failures = 0;
    uint64_t first_failure = 0;
    uint64_t hash = 0xCBF29CE484222325ull;
    uint64_t num_steps = 0;
    uint64_t max_now_ns = 0;
    int num_threads = 0;
    std::string error;
};

void run_seed(const Case& one, uint64_t seed, Tally* tally) {
    emu::Cluster cluster(one.num_ranks, seed, arguments.settings.options);
    const std::string error = one.body(cluster);
    const emu::Statistics statistics = cluster.statistics();
    ++tally->num_seeds;
    tally->hash = (tally->hash ^ statistics.trace_hash) * 0x100000001B3ull;
    tally->num_steps += statistics.steps;
    tally->num_threads = statistics.num_threads;
    if (statistics.now_ns > tally->max_now_ns) tally->max_now_ns = statistics.now_ns;
    if (error.empty()) return;
    if (tally->num_failures++ > 0) return;
    tally->first_failure = seed;
    tally->error = error;
}

void print(const Case& one, const Tally& tally, double seconds) {
    std::printf(
        "{\"case\": \"%s\", \"seeds\": %lu, \"failures\": %lu, \"trace_hash\": \"%016lx\", "
        "\"us_per_seed\": %.2f, \"steps_per_seed\": %.1f, \"max_now_ns\": %lu, "
        "\"threads\": %d, \"notes\": {",
        one.name.c_str(), tally.num_seeds, tally.num_failures, tally.hash,
        seconds * 1e6 / static_cast<double>(tally.num_seeds),
        static_cast<double>(tally.num_steps) / static_cast<double>(tally.num_seeds),
        tally.max_now_ns, tally.num_threads);
    const char* separator = "";
    for (const auto& entry : notes) {
        std::printf("%s\"%s\": %lu", separator, entry.first.c_str(), entry.second);
        separator = ", ";
    }
    std::printf("}");
    if (tally.num_failures) {
        std::printf(
            ", \"first_seed\": %lu, \"error\": \"%s\", \"replay\": \"%s %s --seeds %lu:%lu%s "
            "--trace\"",
            tally.first_failure, escape(tally.error).c_str(), arguments.program.c_str(),
            one.name.c_str(), tally.first_failure, tally.first_failure + 1,
            arguments.replay.c_str());
    }
    std::printf("}\n");
}

int run_case(const Case& one) {
    const auto start = std::chrono::steady_clock::now();
    Tally tally;
    for (uint64_t seed = arguments.first_seed; seed < arguments.end_seed; ++seed) {
        run_seed(one, seed, &tally);
        if (arguments.until_failure && tally.num_failures) break;
    }
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    print(one, tally, elapsed.count());
    return tally.num_failures ? 1 : 0;
}

}  // namespace

const Settings& settings() { return arguments.settings; }

Register::Register(const char* name, int num_ranks, CaseBody body) {
    cases().push_back({name, num_ranks, std::move(body)});
}

void note(const char* outcome) { ++notes[outcome]; }

std::string format(const char* pattern, ...) {
    char text[512];
    std::va_list args;
    va_start(args, pattern);
    std::vsnprintf(text, sizeof text, pattern, args);
    va_end(args);
    return text;
}

static int list_cases() {
    for (const Case& one : cases()) std::printf("%s\n", one.name.c_str());
    return 0;
}

static int run_main(int argc, char** argv) {
    parse(argc, argv);
    if (arguments.name == "--list") return list_cases();
    for (const Case& one : cases()) {
        if (one.name == arguments.name) return run_case(one);
    }
    usage(("no case " + arguments.name).c_str());
}

}  // namespace deepcomm::testing

bool deepcomm_mutant(int mutant) { return mutant == deepcomm::testing::arguments.mutant; }

int main(int argc, char** argv) { return deepcomm::testing::run_main(argc, argv); }
