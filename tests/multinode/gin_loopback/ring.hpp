// SPDX-License-Identifier: Apache-2.0
// Shared memory between the ranks of one host. Each rank owns one file, its inbox, with a ring for
// every source; the file's name is gone once all ranks have mapped it, its lock once the rank is.
//
//     inbox:  page 0 {magic, mapped, scratch} | source 0: control page, data | source 1: ...
//     ring:   entries from head (what the owner has consumed) to tail (what the source has written)
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>

namespace loopback {

using Clock = std::chrono::steady_clock;

constexpr size_t kPageBytes = 4096;

/// How long anything here waits for another rank.
Clock::duration timeout();

enum class Kind : uint32_t {
    kWrap,   ///< fills the ring up to its end
    kPut,    ///< payload to (region, offset), then the signal if there is one
    kGet,    ///< asks for (region, offset), value bytes, to be sent to (other region, other offset)
    kReply,  ///< payload to (region, offset); the last one names the request
};

/// What stands before each payload.
struct alignas(64) Entry {
    Kind kind;
    uint32_t operation;  ///< of the signal; 0: none
    uint64_t num_bytes;  ///< of the payload behind this entry
    uint64_t region, offset;
    uint64_t other_region, other_offset;  ///< the signal's place; a get's destination
    uint64_t value;                       ///< the signal's; a get's bytes
    uint64_t request;                     ///< the one that asked, 0: the reply goes on
};
static_assert(sizeof(Entry) == 64);

struct RingControl {
    alignas(64) std::atomic<uint64_t> tail;
    alignas(64) std::atomic<uint64_t> head;
};

/// One end's view of a ring. Positions count bytes and never wrap.
struct Ring {
    RingControl* control = nullptr;
    char* data = nullptr;
    uint64_t capacity = 0;

    Entry& entry(uint64_t position) const {
        return *reinterpret_cast<Entry*>(data + position % capacity);
    }
    char* payload(uint64_t position) const { return data + position % capacity + sizeof(Entry); }
    uint64_t until_end(uint64_t position) const { return capacity - position % capacity; }

    static uint64_t bytes_of(uint64_t payload_bytes) {
        return sizeof(Entry) + (payload_bytes + sizeof(Entry) - 1) / sizeof(Entry) * sizeof(Entry);
    }
    /// Moved at a time: a quarter, so that both ends have something to do.
    uint64_t batch_bytes() const { return capacity / 4; }
    uint64_t max_payload_bytes() const { return capacity / 8; }
};

struct InboxHeader {
    std::atomic<uint64_t> magic;
    std::atomic<uint32_t> mapped;
    alignas(64) uint64_t scratch;  ///< through which the owner changes words on its GPU
};

/// A mapped inbox, its owner's or another rank's.
class Inbox {
  public:
    Inbox() = default;
    ~Inbox();
    Inbox(const Inbox&) = delete;
    Inbox& operator=(const Inbox&) = delete;

    /// Makes the own one, and locks it. Throws std::runtime_error, as all below.
    void create(const std::string& path, int num_ranks);
    /// Maps another rank's, which may not be there yet.
    void open(const std::string& path, int num_ranks, Clock::time_point deadline);
    /// Waits until every rank has mapped the own one, then takes its name away.
    void publish(int num_ranks, Clock::time_point deadline);

    /// Whether the owner has closed it or is dead.
    bool is_gone() const;

    Ring ring(int source) const;
    InboxHeader& header() const { return *reinterpret_cast<InboxHeader*>(base_); }
    char* base() const { return base_; }
    size_t num_bytes() const { return num_bytes_; }

  private:
    void map(int num_ranks);

    std::string path_;
    bool is_named_ = false;
    int fd_ = -1;
    char* base_ = nullptr;
    size_t num_bytes_ = 0;
    uint64_t capacity_ = 0;
};

}  // namespace loopback
