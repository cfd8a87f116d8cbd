// SPDX-License-Identifier: Apache-2.0
// One communicator of a plugin: the rings to and from all its ranks, the registered memory, and the
// requests that are under way. Any thread may call; one at a time goes on.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "link.hpp"

namespace loopback {

struct Peer {
    Peer(const Ring& to, const Ring& from, int rank) : outbound(to), inbound(from, rank) {}

    Inbox inbox;  ///< the peer's; unused for the own rank
    Outbound outbound;
    Inbound inbound;
    std::unique_ptr<Pinned> pinned;
    std::unique_ptr<Lane> sending, receiving;
    bool is_gone = false;
    int num_gets = 0;       ///< that the peer has not answered
    uint64_t progress = 0;  ///< of both directions, when something last moved
    Clock::time_point moved_at{}, looked_at{};

    bool is_waited_for() const { return num_gets > 0 || !outbound.is_idle(); }
};

class Comm : private Owner {
  public:
    /// Collective: paths are those of all ranks' inboxes. Throws std::runtime_error, as all below.
    Comm(const std::vector<std::string>& paths, int rank);
    ~Comm() override;

    std::shared_ptr<const Region> add(void* address, uint64_t num_bytes, bool on_device);
    void remove(uint64_t index);

    /// Starts to move something to a peer, or an answer from it.
    void* start(Work work, int peer);
    void* start_done(int peer);  ///< a request that is done
    void check(const Region& region, uint64_t offset, uint64_t num_bytes) const;

    enum class State { kUnderWay, kDone, kFailed };
    State test(void* request);  ///< forgets it unless it is under way
    void progress();
    bool has_failed();
    /// Lets peers see that what they have sent has arrived, before nobody calls progress any more.
    void settle();

    int num_ranks() const { return static_cast<int>(peers_.size()); }

  private:
    const Region* find(uint64_t index, uint64_t offset, uint64_t num_bytes) override;
    void signal(const Entry& entry) override;
    void reply(int peer, const Entry& entry) override;
    void complete(uint64_t request) override;

    void open_device(const void* address);
    void push(Peer& peer, Work work);
    void move_all();
    void move(int rank);
    void watch(int rank);
    void give_up(int rank, const char* why);
    void fail(const std::string& what);
    void move_until(const std::function<bool(const Peer&)>& is_enough);

    std::mutex mutex_;
    int rank_;
    Inbox inbox_;
    std::unique_ptr<Device> device_;
    std::unique_ptr<Pinned> pinned_;
    std::unique_ptr<Lane> signals_;
    std::vector<std::unique_ptr<Peer>> peers_;
    std::unordered_map<uint64_t, std::shared_ptr<const Region>> regions_;
    uint64_t num_registered_ = 0;
    std::unordered_map<void*, std::shared_ptr<Request>> requests_;
    bool has_failed_ = false;
};

}  // namespace loopback
