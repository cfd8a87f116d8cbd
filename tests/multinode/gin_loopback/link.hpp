// SPDX-License-Identifier: Apache-2.0
// The two directions between a rank and a peer: what goes into the peer's ring, and what comes out
// of the own one. Both move a batch at a time and are called again and again; neither waits.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <utility>

#include "device.hpp"
#include "ring.hpp"

namespace loopback {

constexpr uint64_t kNoRegion = ~uint64_t{0};

/// Registered memory. Ranks register in one order, so an index names the same one on all.
struct Region {
    uint64_t index;
    char* address;
    uint64_t num_bytes;
    bool on_device;
};

struct Request {
    int peer;
    bool is_done = false;
    bool has_failed = false;
};

/// Something to be sent: its entry, as the last piece will have it, and its payload.
struct Work {
    Entry entry{};
    std::shared_ptr<const Region> source;
    uint64_t source_offset = 0;
    uint64_t num_bytes = 0;
    uint64_t staged = 0;
    std::shared_ptr<Request> request;  ///< done once the peer has consumed the last piece
};

class Outbound {
  public:
    explicit Outbound(const Ring& ring) : ring_(ring) {}

    void push(Work work) { waiting_.push_back(std::move(work)); }
    void advance(Lane* lane);
    void complete();  ///< the requests that the peer has consumed
    void drop();      ///< all that has not been staged

    bool is_copying() const { return is_copying_; }
    bool is_idle() const { return waiting_.empty() && unconsumed_.empty() && !is_copying_; }
    uint64_t consumed() const { return ring_.control->head.load(std::memory_order_relaxed); }

  private:
    bool stage(Work& work, Lane* lane);
    bool reserve(uint64_t num_bytes);
    void publish();

    Ring ring_;
    std::deque<Work> waiting_;
    std::deque<std::pair<uint64_t, std::shared_ptr<Request>>> unconsumed_;  // (end, request)
    uint64_t tail_ = 0;  // staged up to here, which the peer sees once the copies have ended
    bool is_copying_ = false;
    bool has_copied_ = false;
};

/// What a ring's owner does for the entries in it.
class Owner {
  public:
    virtual ~Owner() = default;
    /// Returns registered memory, null where it is not registered yet; throws where it never can.
    virtual const Region* find(uint64_t index, uint64_t offset, uint64_t num_bytes) = 0;
    virtual void signal(const Entry& entry) = 0;
    virtual void reply(int peer, const Entry& entry) = 0;
    virtual void complete(uint64_t request) = 0;
};

class Inbound {
  public:
    Inbound(const Ring& ring, int source) : ring_(ring), source_(source) {}

    void advance(Lane* lane, Owner& owner);

    bool is_copying() const { return is_copying_; }
    bool is_idle() const {
        return !is_copying_ && ring_.control->tail.load(std::memory_order_relaxed) == read_;
    }
    uint64_t consumed() const { return read_; }

  private:
    void take(Lane* lane, Owner& owner);
    bool accept(const Entry& entry, uint64_t position, Lane* lane, Owner& owner);
    void finish(Owner& owner);

    Ring ring_;
    int source_;
    uint64_t read_ = 0;
    std::optional<Entry> last_;  // acted on once the copies before it have ended
    bool is_copying_ = false;
    bool has_copied_ = false;
    uint64_t refused_ = ~uint64_t{0};  // position of the entry whose memory is not there yet
};

}  // namespace loopback
