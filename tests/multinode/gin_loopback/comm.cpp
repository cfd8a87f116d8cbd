// SPDX-License-Identifier: Apache-2.0
#include "comm.hpp"

#include <stdexcept>
#include <thread>
#include <utility>

#include "log.hpp"
#include "nccl_plugin.hpp"

namespace loopback {

namespace {

constexpr auto kLookEvery = std::chrono::milliseconds(20);
constexpr auto kSettleFor = std::chrono::seconds(2);

unsigned long long number(uint64_t value) { return value; }

}  // namespace

Comm::Comm(const std::vector<std::string>& paths, int rank) : rank_(rank) {
    const auto num_ranks = static_cast<int>(paths.size());
    const auto deadline = Clock::now() + timeout();
    inbox_.create(paths[static_cast<size_t>(rank)], num_ranks);
    for (int peer_idx = 0; peer_idx < num_ranks; ++peer_idx) {
        auto peer = std::make_unique<Peer>(inbox_.ring(rank), inbox_.ring(peer_idx), peer_idx);
        if (peer_idx != rank) {
            peer->inbox.open(paths[static_cast<size_t>(peer_idx)], num_ranks, deadline);
            peer->outbound = Outbound(peer->inbox.ring(rank));
        }
        peers_.push_back(std::move(peer));
    }
    inbox_.publish(num_ranks, deadline);
}

Comm::~Comm() {
    if (device_ == nullptr) {
        return;
    }
    try {
        const Device::Scope scope(*device_);
        for (const auto& peer : peers_) {
            peer->sending.reset();
            peer->receiving.reset();
            peer->pinned.reset();
        }
        signals_.reset();
        pinned_.reset();
    } catch (const std::exception& error) {
        log(kFailures, "rank %d: closing: %s", rank_, error.what());
    }
}

void Comm::open_device(const void* address) {
    device_ = std::make_unique<Device>(address);
    const Device::Scope scope(*device_);
    pinned_ = std::make_unique<Pinned>(*device_, inbox_.base(), inbox_.num_bytes());
    signals_ = std::make_unique<Lane>(*device_);
    for (int peer_idx = 0; peer_idx < num_ranks(); ++peer_idx) {
        Peer& peer = *peers_[static_cast<size_t>(peer_idx)];
        if (peer_idx != rank_) {
            const Ring ring = peer.inbox.ring(rank_);
            peer.pinned = std::make_unique<Pinned>(*device_, ring.data, ring.capacity);
        }
        peer.sending = std::make_unique<Lane>(*device_);
        peer.receiving = std::make_unique<Lane>(*device_);
    }
    log(kCalls, "rank %d: on GPU %d", rank_, device_->ordinal());
}

std::shared_ptr<const Region> Comm::add(void* address, uint64_t num_bytes, bool on_device) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (on_device && device_ == nullptr) {
        open_device(address);
    }
    auto region = std::make_shared<const Region>(
        Region{num_registered_++, static_cast<char*>(address), num_bytes, on_device});
    regions_[region->index] = region;
    log(kCalls, "rank %d: memory %llu is %p, %llu bytes, %s", rank_, number(region->index), address,
        number(num_bytes), on_device ? "device" : "host");
    return region;
}

void Comm::remove(uint64_t index) {
    const std::lock_guard<std::mutex> lock(mutex_);
    move_until(
        [](const Peer& peer) { return !peer.inbound.is_copying() && !peer.outbound.is_copying(); });
    regions_.erase(index);
    log(kCalls, "rank %d: memory %llu is no more", rank_, number(index));
}

void* Comm::start(Work work, int peer_idx) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Peer& peer = *peers_[static_cast<size_t>(peer_idx)];
    auto request = std::make_shared<Request>(Request{peer_idx});
    request->has_failed = peer.is_gone || has_failed_;
    requests_[request.get()] = request;
    if (request->has_failed) {
        return request.get();
    }
    const bool is_get = work.entry.kind == Kind::kGet;
    if (is_get) {
        work.entry.request = reinterpret_cast<uint64_t>(request.get());
    } else {
        work.request = request;
    }
    push(peer, std::move(work));
    peer.num_gets += is_get ? 1 : 0;
    return request.get();
}

void Comm::push(Peer& peer, Work work) {
    if (!peer.is_waited_for()) {
        peer.moved_at = Clock::now();
    }
    peer.outbound.push(std::move(work));
}

void* Comm::start_done(int peer) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto request = std::make_shared<Request>(Request{peer, true});
    requests_[request.get()] = request;
    return request.get();
}

void Comm::check(const Region& region, uint64_t offset, uint64_t num_bytes) const {
    if (offset > region.num_bytes || num_bytes > region.num_bytes - offset) {
        throw std::runtime_error("memory " + std::to_string(region.index) + ": expected at most " +
                                 std::to_string(region.num_bytes) + " bytes, got [" +
                                 std::to_string(offset) + ", +" + std::to_string(num_bytes) + ")");
    }
}

Comm::State Comm::test(void* handle) {
    const std::lock_guard<std::mutex> lock(mutex_);
    move_all();
    const auto found = requests_.find(handle);
    if (found == requests_.end()) {
        throw std::runtime_error("a request that is not under way");
    }
    const Request request = *found->second;
    if (!request.is_done && !request.has_failed) {
        return State::kUnderWay;
    }
    requests_.erase(found);
    return request.is_done ? State::kDone : State::kFailed;
}

void Comm::progress() {
    const std::lock_guard<std::mutex> lock(mutex_);
    move_all();
}

bool Comm::has_failed() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return has_failed_;
}

void Comm::settle() {
    const std::lock_guard<std::mutex> lock(mutex_);
    move_until([](const Peer& peer) { return peer.inbound.is_idle(); });
}

void Comm::move_until(const std::function<bool(const Peer&)>& is_enough) {
    const auto deadline = Clock::now() + kSettleFor;
    while (!has_failed_ && Clock::now() < deadline) {
        bool is_over = true;
        for (const auto& peer : peers_) {
            is_over = is_over && is_enough(*peer);
        }
        if (is_over) {
            return;
        }
        move_all();
        std::this_thread::yield();
    }
}

void Comm::move_all() {
    bool is_idle = true;
    for (const auto& peer : peers_) {
        is_idle = is_idle && !peer->is_waited_for() && peer->inbound.is_idle();
    }
    if (is_idle || has_failed_) {
        return;
    }
    try {
        std::unique_ptr<Device::Scope> scope;
        if (device_ != nullptr) {
            scope = std::make_unique<Device::Scope>(*device_);
        }
        for (int peer_idx = 0; peer_idx < num_ranks(); ++peer_idx) {
            move(peer_idx);
            watch(peer_idx);
        }
    } catch (const std::exception& error) {
        fail(error.what());
    }
}

void Comm::move(int peer_idx) {
    Peer& peer = *peers_[static_cast<size_t>(peer_idx)];
    if (!peer.inbound.is_idle()) {
        peer.inbound.advance(peer.receiving.get(), *this);
    }
    if (!peer.is_gone && !peer.outbound.is_idle()) {
        peer.outbound.advance(peer.sending.get());
    }
}

void Comm::watch(int peer_idx) {
    Peer& peer = *peers_[static_cast<size_t>(peer_idx)];
    if (peer_idx == rank_ || peer.is_gone || !peer.is_waited_for()) {
        return;
    }
    const auto now = Clock::now();
    const uint64_t progress = peer.outbound.consumed() + peer.inbound.consumed();
    if (progress != peer.progress) {
        peer.progress = progress;
        peer.moved_at = now;
    }
    if (now - peer.looked_at < kLookEvery) {
        return;
    }
    peer.looked_at = now;
    if (peer.inbox.is_gone()) {
        peer.outbound.complete();  // what it consumed just before
        give_up(peer_idx, "is gone");
    } else if (now - peer.moved_at > timeout()) {
        give_up(peer_idx, "does not go on");
    }
}

void Comm::give_up(int peer_idx, const char* why) {
    Peer& peer = *peers_[static_cast<size_t>(peer_idx)];
    peer.is_gone = true;
    peer.num_gets = 0;
    peer.outbound.drop();
    int num_failed = 0;
    for (const auto& [handle, request] : requests_) {
        if (request->peer == peer_idx && !request->is_done) {
            request->has_failed = true;
            ++num_failed;
        }
    }
    log(num_failed > 0 ? kFailures : kCalls, "rank %d: peer %d %s; %d requests fail", rank_,
        peer_idx, why, num_failed);
}

void Comm::fail(const std::string& what) {
    has_failed_ = true;
    log(kFailures, "rank %d: %s", rank_, what.c_str());
    for (const auto& [handle, request] : requests_) {
        request->has_failed = !request->is_done;
    }
}

const Region* Comm::find(uint64_t index, uint64_t offset, uint64_t num_bytes) {
    const auto found = regions_.find(index);
    if (found != regions_.end()) {
        check(*found->second, offset, num_bytes);
        return found->second.get();
    }
    if (index < num_registered_) {
        throw std::runtime_error("memory " + std::to_string(index) + " is no more");
    }
    return nullptr;
}

void Comm::signal(const Entry& entry) {
    const Region& region = *find(entry.other_region, entry.other_offset, sizeof(uint64_t));
    const uint64_t amount = entry.operation == nccl::kIncrement ? 1 : entry.value;
    auto* const word = reinterpret_cast<uint64_t*>(region.address + entry.other_offset);
    log(kOperations, "rank %d: memory %llu +%llu gets %llu", rank_, number(region.index),
        number(entry.other_offset), number(amount));
    if (!region.on_device) {
        __atomic_fetch_add(word, amount, __ATOMIC_RELEASE);
        return;
    }
    // Read anew each time: kernels may reset the word. Only this thread adds to it.
    uint64_t& scratch = inbox_.header().scratch;
    signals_->copy(&scratch, word, sizeof(uint64_t));
    signals_->wait();
    scratch += amount;
    signals_->copy(word, &scratch, sizeof(uint64_t));
    signals_->wait();
}

void Comm::reply(int peer, const Entry& entry) {
    find(entry.region, entry.offset, entry.value);
    Work work;
    work.entry.kind = Kind::kReply;
    work.entry.region = entry.other_region;
    work.entry.offset = entry.other_offset;
    work.entry.request = entry.request;
    work.source = regions_.at(entry.region);
    work.source_offset = entry.offset;
    work.num_bytes = entry.value;
    push(*peers_[static_cast<size_t>(peer)], std::move(work));
}

void Comm::complete(uint64_t request) {
    const auto found = requests_.find(reinterpret_cast<void*>(request));
    if (found != requests_.end() && !found->second->has_failed) {
        found->second->is_done = true;
        --peers_[static_cast<size_t>(found->second->peer)]->num_gets;
    }
}

}  // namespace loopback
