// SPDX-License-Identifier: Apache-2.0
#include "cpu/endpoint.hpp"

#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <new>
#include <thread>

#include "common/env.hpp"
#include "common/error.hpp"

namespace deepcomm::cpu {

namespace {

Isa chosen_isa() {
    const std::string wanted = env_cpu_isa();
    if (wanted.empty()) {
        return best_isa();
    }
    for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512}) {
        if (wanted == isa_name(isa)) {
            DEEPCOMM_CHECK_ARG(isa_supported(isa), "DEEPCOMM_CPU_ISA: this machine lacks %s",
                               wanted.c_str());
            return isa;
        }
    }
    throw InvalidArgument(
        format("DEEPCOMM_CPU_ISA: expected portable, avx2 or avx512, got %s", wanted.c_str()));
}

int open_pid(int32_t pid) {
    if (pid <= 0 || pid == getpid()) {
        return -1;
    }
    return static_cast<int>(syscall(SYS_pidfd_open, pid, 0));
}

}  // namespace

Endpoint::Endpoint(const EndpointConfig& config, WaitPolicy policy)
    : config_(config),
      map_(layout::SegmentLayout::make(config.shape())),
      policy_(std::move(policy)),
      isa_(chosen_isa()),
      ops_(&row_ops(isa_)),
      segment_(Segment::create(map_.total_bytes)),
      own_control_(nullptr),
      leases_(std::make_shared<Leases>()),
      results_(std::make_shared<ResultPool>(  // as much as one landing area
          config.shape().max_rows() * config.hidden * layout::kDefaultItemBytes)),
      pool_(std::make_unique<ThreadPool>(config.num_threads)),
      last_read_(static_cast<size_t>(config.num_generations), 0) {
    std::vector<Segment::Range> ranges{{0, map_.control_bytes()}};
    const int64_t generation_bytes = map_.reserved_generation_bytes(config_.shape());
    for (int32_t index = 0; index < config_.num_generations; ++index) {
        ranges.push_back({map_.generation_begin(index), generation_bytes});
    }
    segment_->reserve(ranges);
    rows_reserved_.assign(static_cast<size_t>(config_.num_generations),
                          generation_bytes - map_.generation.rows);
    own_control_ = new (segment_->data()) Control{};
    pid_ = getpid();
    leases_->segment = segment_;
    counters_.wait_us.assign(static_cast<size_t>(config_.num_ranks), 0);
}

Endpoint::~Endpoint() {
    if (getpid() != pid_) {  // a forked child: neither the segment nor the threads are its own
        static_cast<void>(pool_.release());
    }
    close();
    for (const Peer& peer : peers_) {
        if (peer.pid_fd >= 0) {
            ::close(peer.pid_fd);
        }
    }
}

void Endpoint::connect(const std::vector<std::string>& names, const std::vector<int32_t>& pids) {
    for (size_t local = 0; local < names.size(); ++local) {
        Peer peer;
        peer.rank = config_.node() * config_.ranks_per_node + static_cast<int32_t>(local);
        peer.segment =
            peer.rank == config_.rank ? segment_ : Segment::open(names[local], map_.total_bytes);
        peer.control = reinterpret_cast<Control*>(peer.segment->data());
        peer.pid_fd = peer.rank == config_.rank ? -1 : open_pid(pids[local]);
        peers_.push_back(std::move(peer));
    }
    waiter_ = std::make_unique<Waiter>(config_.rank, *own_control_, peers_, policy_);
}

std::atomic<uint64_t>& Endpoint::arrival(int32_t local, int32_t source) const {
    return *reinterpret_cast<std::atomic<uint64_t>*>(base(local) + map_.arrivals +
                                                     source * layout::kCacheLine);
}

Announcement& Endpoint::announcement(int32_t other, uint64_t epoch) const {
    const int32_t via =
        config_.local_of(other);  // its own segment, or the rail peer that relays it
    const int64_t index = 2 * config_.node_of(other) + static_cast<int64_t>(epoch % 2);
    return *reinterpret_cast<Announcement*>(base(via) + map_.announcements +
                                            index * map_.announcement_stride);
}

Announcement& Endpoint::own_announcement(int32_t node, uint64_t epoch) const {
    return announcement(node * config_.ranks_per_node + config_.local(), epoch);
}

void Endpoint::finish_epoch(uint64_t epoch) {
    own_control_->progress.store(epoch, std::memory_order_release);
    ring_all();
}

void Endpoint::wait_readers(uint64_t epoch, OpKind kind) {
    for (const Peer& peer : peers_) {
        wait_for(peer.rank, kind, "it to finish reading",
                 [&] { return peer.control->progress.load(std::memory_order_acquire) >= epoch; });
    }
}

void Endpoint::continue_from(const Endpoint& other) {
    epoch_ = other.epoch_;
    own_control_->progress.store(epoch_, std::memory_order_release);
    counters_.num_dispatches = other.counters_.num_dispatches;
    counters_.num_combines = other.counters_.num_combines;
    counters_.tokens_sent = other.counters_.tokens_sent;
    counters_.tokens_received = other.counters_.tokens_received;
    counters_.bytes_local = other.counters_.bytes_local.load();
    counters_.bytes_node = other.counters_.bytes_node.load();
    counters_.bytes_network = other.counters_.bytes_network.load();
    counters_.wait_us = other.counters_.wait_us;
}

std::shared_ptr<std::byte> Endpoint::lease(int32_t generation, int64_t offset) const {
    leases_->count[static_cast<size_t>(generation)].fetch_add(1, std::memory_order_relaxed);
    return {leases_->segment->data() + offset, [leases = leases_, generation](std::byte*) {
                // ORDER: pairs with the acquire in choose_landing: the reader is done first.
                leases->count[static_cast<size_t>(generation)].fetch_sub(1,
                                                                         std::memory_order_release);
            }};
}

Landing Endpoint::choose_landing(OpKind kind) {
    const int32_t count = config_.num_generations;
    int32_t chosen = -1;
    int32_t num_free = 0;
    for (int32_t step = 1; step <= count; ++step) {
        const int32_t index = (last_generation_ + step) % count;
        if (leases_->count[static_cast<size_t>(index)].load(std::memory_order_acquire) == 0) {
            ++num_free;
            chosen = chosen < 0 ? index : chosen;
        }
    }
    DEEPCOMM_ASSERT(chosen >= 0, "every generation is leased");
    last_generation_ = chosen;
    wait_readers(last_read_[static_cast<size_t>(chosen)], kind);
    return {chosen, num_free > 1};
}

void Endpoint::mark_read(int32_t generation, uint64_t epoch) {
    last_read_[static_cast<size_t>(generation)] = epoch;
}

bool Endpoint::ensure_rows(int32_t generation, int64_t num_bytes) {
    int64_t& reserved = rows_reserved_[static_cast<size_t>(generation)];
    if (num_bytes <= reserved) {
        return true;
    }
    if (num_bytes > map_.rows_capacity) {
        return false;
    }
    const int64_t rows = map_.generation_begin(generation) + map_.generation.rows;
    if (!segment_->try_reserve({rows + reserved, num_bytes - reserved})) {
        return false;
    }
    reserved = num_bytes;
    return true;
}

int32_t Endpoint::generation_of(const void* begin, int64_t num_bytes) const {
    const int64_t offset = static_cast<const std::byte*>(begin) - own_base();
    for (int32_t index = 0; index < config_.num_generations; ++index) {
        const int64_t rows = map_.generation_begin(index) + map_.generation.rows;
        if (offset >= rows &&
            offset + num_bytes <= rows + rows_reserved_[static_cast<size_t>(index)]) {
            return index;
        }
    }
    return -1;
}

void Endpoint::ring_all() {
    for (const Peer& peer : peers_) {
        if (peer.rank != config_.rank) {
            ring_doorbell(*peer.control);
        }
    }
}

void Endpoint::fail(const std::string& message, int32_t culprit) {
    if (!failure_.empty() || closed_) {
        return;
    }
    failure_ = message;
    failure_culprit_ = culprit;
    own_control_->culprit = culprit;
    copy_message(own_control_->message, message);
    own_control_->state.store(PeerState::kFailed, std::memory_order_release);
    ring_all();
}

int32_t Endpoint::find_culprit() const {
    constexpr auto kPatience = std::chrono::milliseconds(200);
    constexpr auto kNap = std::chrono::milliseconds(2);
    const auto start = std::chrono::steady_clock::now();
    while (std::chrono::steady_clock::now() - start < kPatience) {
        for (const Peer& peer : peers_) {
            const bool told =
                peer.rank != config_.rank && !peer.ignored &&
                peer.control->state.load(std::memory_order_acquire) == PeerState::kFailed;
            if (told) {
                return peer.control->culprit;
            }
        }
        std::this_thread::sleep_for(kNap);
    }
    return -1;
}

void Endpoint::check_usable(OpKind kind) const {
    if (closed_) {
        throw PeerLost(format("%s: the buffer is closed", op_name(kind)), -1);
    }
    if (!failure_.empty()) {
        throw PeerLost(
            format("%s: the buffer can only be closed after: %s", op_name(kind), failure_.c_str()),
            failure_culprit_);
    }
}

void Endpoint::close() {
    if (closed_ || getpid() != pid_) {
        return;
    }
    closed_ = true;
    if (failure_.empty()) {
        own_control_->state.store(PeerState::kClosed, std::memory_order_release);
    }
    ring_all();
    segment_->unlink();
    results_->close();
}

}  // namespace deepcomm::cpu
