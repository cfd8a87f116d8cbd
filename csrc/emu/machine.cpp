// SPDX-License-Identifier: Apache-2.0
#include "emu/machine.hpp"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

namespace deepcomm::emu {

Machine* machine = nullptr;

namespace {

std::string format_args(const char* pattern, std::va_list args) {
    char text[1024];
    std::vsnprintf(text, sizeof text, pattern, args);
    return text;
}

void enter_thread() {
    on_first_entry();
    (*machine->kernel_of_current())();
    machine->finish_current();
}

}  // namespace

void fail(const char* pattern, ...) {
    std::va_list args;
    va_start(args, pattern);
    machine->error = format_args(pattern, args);
    va_end(args);
    DEEPCOMM_EMU_TRACE("FAILED: %s", machine->error.c_str());
    if (!machine->current) throw HostFailure(machine->error);
    machine->scheduler.switch_to_host();
    std::abort();  // a failed run never resumes its threads
}

Thread& self() {
    if (!machine || !machine->current) fail("a device function is called outside of a kernel");
    return *machine->current;
}

void Machine::print_event(const char* pattern, ...) {
    std::va_list args;
    va_start(args, pattern);
    const std::string text = format_args(pattern, args);
    va_end(args);
    std::fprintf(stderr, "%8zu ns  %-10s %s\n", static_cast<size_t>(scheduler.now_ns()),
                 current ? actor_name(current->id).c_str() : "host", text.c_str());
}

void Machine::reset(int num_ranks, uint64_t seed, const Options& new_options) {
    options = new_options;
    random = Random(seed);
    shadow_random = Random(~seed);
    error.clear();
    current = nullptr;
    threads.clear();
    thread_of_entry.assign(AsyncEngine::kNumAgents, nullptr);
    ranks.clear();
    pending_frees.clear();
    ranks.resize(static_cast<size_t>(num_ranks));
    memory.reset(options.allow_foreign);
    strong.reset();
    async.reset();
    scheduler.reset();
}

// ---- who is who

int Machine::rank_of_actor(int actor) const {
    if (actor < 0) return kHostRank;
    return thread_of(actor).rank;
}

int Machine::device_of(int rank) const {
    return options.num_devices == 0 ? rank : rank % options.num_devices;
}

std::string Machine::actor_name(int actor) const {
    if (actor < 0) return "the host";
    if (!is_thread(actor)) return "a copy of " + actor_name(async.issuer_of(actor));
    const Thread& thread = thread_of(actor);
    return "r" + std::to_string(thread.rank) + ".b" + std::to_string(thread.block_idx.x) + ".t" +
           std::to_string(thread.thread_idx.x);
}

bool Machine::includes(Scope scope, int from, int to) const {
    if (scope == Scope::kSys) return true;
    if (from < 0 || to < 0) return false;  // the host is reached by the widest scope only
    const Thread& a = thread_of(from);
    const Thread& b = thread_of(to);
    if (device_of(a.rank) != device_of(b.rank)) return false;
    if (scope == Scope::kBlock && a.rank != b.rank) return false;
    return scope == Scope::kGpu || a.block_idx.x == b.block_idx.x;
}

bool Machine::has_ended(int actor, uint32_t epoch) const {
    if (is_thread(actor)) return epoch < thread_of(actor).first_epoch;
    const auto [rank_idx, launch] = async.launch_of(actor, epoch);
    const Rank& rank = ranks[static_cast<size_t>(rank_idx)];
    return launch != rank.num_launches || !rank.is_running;
}

Knowledge Machine::publish(Thread& thread) {
    thread.know.seen.raise(static_cast<size_t>(thread.id), thread.epoch++);
    return thread.know;
}

const std::function<void()>* Machine::kernel_of_current() const {
    return &ranks[static_cast<size_t>(current->rank)].program.front().launch.kernel;
}

// ---- kernels begin and end

int Machine::new_clock_entry(Thread* thread) {
    thread_of_entry.push_back(thread);
    return static_cast<int>(thread_of_entry.size()) - 1;
}

/// Threads and their clock entries are kept: a rank's later kernels go on where earlier ones ended.
void Machine::provide_threads(Rank& rank, size_t count) {
    while (rank.threads.size() < count) {
        threads.emplace_back();
        Thread& thread = threads.back();
        thread.stack_idx = static_cast<int>(threads.size()) - 1;
        thread.id = new_clock_entry(&thread);
        rank.threads.push_back(&thread);
    }
}

void Machine::create_thread(Rank& rank, Block& block, int thread_idx) {
    const Launch& launch = rank.program.front().launch;
    Thread& thread =
        *rank.threads[static_cast<size_t>(block.block_idx * launch.block + thread_idx)];
    Thread fresh;
    fresh.epoch = thread.epoch;  // goes on from the kernel before
    fresh.first_epoch = thread.epoch;
    fresh.id = thread.id;
    fresh.stack_idx = thread.stack_idx;
    thread = std::move(fresh);
    thread.rank = block.rank;
    thread.lane = thread_idx % 32;
    thread.block = &block;
    thread.thread_idx = {static_cast<unsigned>(thread_idx), 0, 0};
    thread.block_idx = {static_cast<unsigned>(block.block_idx), 0, 0};
    thread.block_dim = {static_cast<unsigned>(launch.block), 1, 1};
    thread.grid_dim = {static_cast<unsigned>(launch.grid), 1, 1};
    if (thread.lane == 0) rank.warps.push_back(std::make_unique<Warp>());
    thread.warp = rank.warps.back().get();
    thread.warp->alive |= 1u << thread.lane;
    thread.warp->lanes[thread.lane] = &thread;
    thread.know.seen = rank.know.seen;
    thread.know.proxied = rank.know.seen;  // a kernel boundary orders all proxies
    prepare(thread.context, stacks.get(static_cast<size_t>(thread.stack_idx)), enter_thread);
    scheduler.make_runnable(&thread);
}

void Machine::create_block(Rank& rank, int rank_idx, int block_idx) {
    const Launch& launch = rank.program.front().launch;
    auto block = std::make_unique<Block>();
    block->rank = rank_idx;
    block->block_idx = block_idx;
    block->num_live = launch.block;
    if (launch.smem_bytes) {
        const auto slot = static_cast<size_t>(block_idx);
        if (rank.smem.size() <= slot) rank.smem.resize(slot + 1, {0, 0});
        SmemArea& area = rank.smem[slot];
        if (area.num_bytes < launch.smem_bytes) {
            const std::string name = "b" + std::to_string(block_idx) + ".shared";
            area = {memory.alloc(rank_idx, name, launch.smem_bytes, false), launch.smem_bytes};
        } else {
            memory.recycle(area.offset, area.num_bytes);
        }
        async.drop_mbarriers(area.offset, area.num_bytes);
        block->smem_offset = area.offset;
        block->smem_bytes = launch.smem_bytes;
    }
    for (int i = 0; i < launch.block; ++i) create_thread(rank, *block, i);
    rank.blocks.push_back(std::move(block));
}

void Machine::start_launch(Rank& rank, int rank_idx) {
    const Launch& launch = rank.program.front().launch;
    rank.is_running = true;
    ++rank.num_launches;
    rank.num_live = launch.grid * launch.block;
    provide_threads(rank, static_cast<size_t>(rank.num_live));
    rank.blocks.clear();
    rank.warps.clear();
    for (int i = 0; i < launch.grid; ++i) create_block(rank, rank_idx, i);
    scheduler.note_progress();
}

/// A kernel ends when its threads have ended and its copies have landed; its stream knows it all.
void Machine::end_launch(Rank& rank) {
    for (Thread* each : rank.threads) {
        Thread& thread = *each;
        rank.know.join(thread.know);
        rank.know.seen.raise(static_cast<size_t>(thread.id), thread.epoch++);
        thread.first_epoch = thread.epoch;
        for (const BulkGroup& group : thread.groups) {
            for (const AgentSpan& copy : group.copies) {
                rank.know.seen.raise(static_cast<size_t>(copy.agent), copy.write_epoch);
            }
        }
        for (const AgentSpan& copy : thread.open_group.copies) {
            rank.know.seen.raise(static_cast<size_t>(copy.agent), copy.write_epoch);
        }
    }
    rank.is_running = false;
    rank.program.pop_front();
    ++rank.num_ended;
    free_what_is_due();
}

void Machine::launch(int rank, Launch launch) {
    Rank& owner = ranks[static_cast<size_t>(rank)];
    owner.program.push_back({false, std::move(launch)});
    ++owner.num_queued;
}

void Machine::free_later(size_t offset) {
    PendingFree pending{offset, {}};
    for (const Rank& rank : ranks) pending.num_ended.push_back(rank.num_queued);
    pending_frees.push_back(std::move(pending));
    free_what_is_due();
}

void Machine::free_what_is_due() {
    const auto is_due = [&](const PendingFree& pending) {
        for (size_t i = 0; i < ranks.size(); ++i) {
            if (ranks[i].num_ended < pending.num_ended[i]) return false;
        }
        memory.free(pending.offset);
        return true;
    };
    pending_frees.erase(std::remove_if(pending_frees.begin(), pending_frees.end(), is_due),
                        pending_frees.end());
}

/// Ends kernels that are through and starts what their streams hold next; false if there is none.
bool Machine::start_ready_launches() {
    bool all_at_barrier = true;
    for (size_t i = 0; i < ranks.size(); ++i) {
        Rank& rank = ranks[i];
        if (rank.is_running && rank.num_live == 0 && rank.num_copies == 0) end_launch(rank);
        if (!rank.is_running && !rank.program.empty() && !rank.program.front().is_barrier) {
            start_launch(rank, static_cast<int>(i));
        }
        const bool is_at_barrier =
            !rank.is_running && !rank.program.empty() && rank.program.front().is_barrier;
        all_at_barrier = all_at_barrier && is_at_barrier;
    }
    if (!all_at_barrier) return false;
    Knowledge joint;
    for (const Rank& rank : ranks) joint.join(rank.know);
    for (Rank& rank : ranks) {
        rank.know = joint;
        rank.program.pop_front();
    }
    return true;
}

void Machine::on_copy_done(int rank_idx) {
    Rank& rank = ranks[static_cast<size_t>(rank_idx)];
    if (--rank.num_copies == 0 && rank.num_live == 0) scheduler.request_host();
}

void Machine::finish_current() {
    Thread& me = self();
    async.check_exit(me);
    if (is_overrun(me.context)) fail("%s overran its stack", actor_name(me.id).c_str());
    scheduler.park_current("exited", Memory::kOutside, kNever);
    me.is_finished = true;
    me.warp->alive &= ~(1u << me.lane);
    --me.block->num_live;
    Rank& rank = ranks[static_cast<size_t>(me.rank)];
    if (--rank.num_live == 0 && rank.num_copies == 0) scheduler.request_host();
    check_block_barriers(*me.block);
    check_collectives(*me.warp);
    scheduler.note_progress();
    scheduler.switch_away();
    std::abort();  // nobody resumes a finished thread
}

// ---- the run

bool Machine::is_done() const {
    for (size_t i = 0; i < ranks.size(); ++i) {
        const bool is_stopped = static_cast<int>(i) == options.faults.stop_rank;
        if (!is_stopped && !ranks[i].program.empty()) return false;
    }
    return true;
}

std::string Machine::run() {
    try {
        do {
            while (start_ready_launches()) {
            }
        } while (scheduler.run_from_host() && error.empty());
    } catch (const HostFailure&) {
        current = nullptr;
    }
    if (error.empty() && !is_done()) error = describe_deadlock();
    return error;
}

std::string Machine::describe_wait(const Thread& thread) const {
    std::string text = actor_name(thread.id) + " waits for " + thread.wait.what;
    if (thread.wait.offset == Memory::kOutside) return text;
    text += " " + memory.describe(thread.wait.offset);
    if (async.is_mbarrier(thread.wait.offset)) return text;
    uint32_t value = 0;
    __builtin_memcpy(&value, memory.at(thread.wait.offset), sizeof value);
    return text + " (holds " + std::to_string(value) + ")";
}

/// Who waits for what; threads of one block that wait alike are one line.
std::string Machine::describe_deadlock() const {
    std::string text = "deadlock:";
    constexpr int kMaxLines = 12;
    int num_lines = 0;
    const Thread* last = nullptr;
    int num_alike = 0;
    const auto flush = [&] {
        if (num_alike > 0) text += " (and " + std::to_string(num_alike) + " more alike)";
        num_alike = 0;
    };
    for (const Thread& thread : threads) {
        if (thread.is_finished || !thread.block) continue;
        const bool is_alike = last && last->block == thread.block &&
                              last->wait.what == thread.wait.what &&
                              last->wait.offset == thread.wait.offset;
        if (is_alike) {
            ++num_alike;
            continue;
        }
        flush();
        last = &thread;
        if (++num_lines > kMaxLines) return text + "\n  ...";
        text += "\n  " + describe_wait(thread);
    }
    flush();
    return text;
}

}  // namespace deepcomm::emu
