// SPDX-License-Identifier: Apache-2.0
// One rank's end of the exchange inside its node: the segments of its peers, the ring of landing
// generations and their leases, threads, counters, and the failed state. Operations (dispatch.hpp,
// combine.hpp, low_latency.hpp) work through it.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "cpu/control.hpp"
#include "cpu/result_pool.hpp"
#include "cpu/segment.hpp"
#include "cpu/simd/simd.hpp"
#include "cpu/thread_pool.hpp"
#include "cpu/wait.hpp"

namespace deepcomm::cpu {

struct EndpointConfig {
    int32_t rank;
    int32_t num_ranks;
    int32_t ranks_per_node;
    int32_t num_experts;
    int32_t num_topk;
    int32_t hidden;
    int32_t max_tokens;
    int32_t num_generations;
    int32_t num_slots;
    int32_t num_threads;

    int32_t num_nodes() const { return num_ranks / ranks_per_node; }
    int32_t node() const { return rank / ranks_per_node; }
    int32_t local() const { return rank % ranks_per_node; }
    int32_t num_local_experts() const { return num_experts / num_ranks; }
    int32_t node_of(int32_t other) const { return other / ranks_per_node; }
    int32_t local_of(int32_t other) const { return other % ranks_per_node; }
    bool is_local(int32_t other) const { return node_of(other) == node(); }
    layout::SegmentShape shape() const {
        return {num_ranks, num_nodes(), num_experts,     num_topk,
                hidden,    max_tokens,  num_generations, num_slots};
    }
};

struct Counters {
    int64_t num_dispatches = 0;
    int64_t num_combines = 0;
    int64_t tokens_sent = 0;
    int64_t tokens_received = 0;
    std::atomic<int64_t> bytes_local{0};
    std::atomic<int64_t> bytes_node{0};
    std::atomic<int64_t> bytes_network{0};
    std::vector<int64_t> wait_us;
};

/// Shared with the views, which may outlive the endpoint.
struct Leases {
    std::shared_ptr<Segment> segment;
    std::array<std::atomic<int32_t>, 64> count{};
};

/// A landing area chosen for one operation.
struct Landing {
    int32_t generation;
    bool leasable;  ///< false: the last free one; its rows must be copied out
};

class Endpoint {
  public:
    /// Creates and reserves this rank's segment; connect() completes the construction.
    Endpoint(const EndpointConfig& config, WaitPolicy policy);
    ~Endpoint();
    Endpoint(const Endpoint&) = delete;
    Endpoint& operator=(const Endpoint&) = delete;

    const std::string& segment_name() const { return segment_->name(); }
    /// Maps the segments of this node's ranks, in local order; pids[i] is 0 where it cannot be watched.
    void connect(const std::vector<std::string>& names, const std::vector<int32_t>& pids);
    /// Removes this rank's segment name; call when all ranks have connected.
    void unlink() { segment_->unlink(); }

    const EndpointConfig& config() const { return config_; }
    const layout::SegmentLayout& map() const { return map_; }
    const RowOps& ops() const { return *ops_; }
    Isa isa() const { return isa_; }
    ThreadPool& pool() { return *pool_; }
    Counters& counters() { return counters_; }
    Segment& segment() { return *segment_; }
    /// Bytes of this rank's segment, from offset on; leases the generation until they are let go.
    std::shared_ptr<std::byte> lease(int32_t generation, int64_t offset) const;
    /// Memory of results that are no views.
    ResultPool& results() const { return *results_; }
    int64_t reserved_bytes() const { return segment_->reserved_bytes(); }

    // Addresses
    std::byte* base(int32_t local) const {
        return peers_[static_cast<size_t>(local)].segment->data();
    }
    Control& control(int32_t local) const { return *peers_[static_cast<size_t>(local)].control; }
    std::byte* own_base() const { return segment_->data(); }
    Control& own_control() const { return *own_control_; }
    /// Epoch of the last arrival from source, at local rank local.
    std::atomic<uint64_t>& arrival(int32_t local, int32_t source) const;
    /// Announcement of rank other for an epoch, as found on this node.
    Announcement& announcement(int32_t other, uint64_t epoch) const;
    /// Slot of this rank's segment that holds node's announcement.
    Announcement& own_announcement(int32_t node, uint64_t epoch) const;

    // Epochs of the high-throughput operations
    uint64_t epoch() const { return epoch_; }
    uint64_t next_epoch() { return ++epoch_; }
    /// Marks the epoch's reads of peers' memory as finished.
    void finish_epoch(uint64_t epoch);
    /// Waits until no rank of the node reads this rank's memory for epoch any more.
    void wait_readers(uint64_t epoch, OpKind kind);
    /// Continues another endpoint's count of epochs (after growing).
    void continue_from(const Endpoint& other);

    // The ring
    Landing choose_landing(OpKind kind);
    /// Notes that peers read this generation during epoch.
    void mark_read(int32_t generation, uint64_t epoch);
    uint64_t last_read(int32_t generation) const {
        return last_read_[static_cast<size_t>(generation)];
    }
    /// Reserves num_bytes for the rows of a generation; false where shared memory is full.
    bool ensure_rows(int32_t generation, int64_t num_bytes);
    int64_t rows_reserved(int32_t generation) const {
        return rows_reserved_[static_cast<size_t>(generation)];
    }
    /// Generation whose rows region holds [begin, begin + num_bytes), or -1.
    int32_t generation_of(const void* begin, int64_t num_bytes) const;

    template <typename Ready>
    void wait_for(int32_t peer_rank, OpKind kind, const char* what, Ready&& ready) {
        wait_on(config_.local_of(peer_rank), peer_rank, kind, what, ready);
    }
    /// The same where another rank's news comes through local rank via_local.
    template <typename Ready>
    void wait_on(int32_t via_local, int32_t blamed_rank, OpKind kind, const char* what,
                 Ready&& ready) {
        waiter_->wait_until(via_local, op_name(kind), what,
                            counters_.wait_us[static_cast<size_t>(blamed_rank)], ready);
    }
    void ring_all();
    /// See Waiter::set_tolerant.
    void set_tolerant(bool tolerant) { waiter_->set_tolerant(tolerant); }
    /// Whether an operation has been opened that is not finished.
    bool epoch_open() const {
        return own_control_->progress.load(std::memory_order_relaxed) != epoch_;
    }
    /// A masked peer's end is nobody's concern.
    void set_ignored(int32_t local, bool ignored) {
        peers_[static_cast<size_t>(local)].ignored = ignored;
    }

    /// Tells all peers that this rank is out; later operations raise.
    void fail(const std::string& message, int32_t culprit);
    bool failed() const { return !failure_.empty(); }
    /// Rank that another rank of this node holds responsible for its own failure, or -1. A failure
    /// spreads fast inside a node: waits for the news a moment.
    int32_t find_culprit() const;
    /// Throws PeerLost where the endpoint has failed or was closed.
    void check_usable(OpKind kind) const;
    void close();

    /// Runs body; an error that is not recoverable fails the endpoint before it leaves.
    template <typename Body>
    auto guarded(Body&& body) {
        try {
            return body();
        } catch (const CommError& error) {
            if (!is_recoverable(error)) {
                fail(error.what(), error.peer);
            }
            throw;
        } catch (const Error& error) {
            if (!is_recoverable(error)) {
                fail(error.what(), config_.rank);
            }
            throw;
        } catch (...) {
            fail("interrupted", config_.rank);
            throw;
        }
    }

  private:
    EndpointConfig config_;
    layout::SegmentLayout map_;
    WaitPolicy policy_;
    Isa isa_;
    const RowOps* ops_;
    std::shared_ptr<Segment> segment_;
    Control* own_control_;
    std::shared_ptr<Leases> leases_;
    std::shared_ptr<ResultPool> results_;
    std::vector<Peer> peers_;
    std::unique_ptr<Waiter> waiter_;
    std::unique_ptr<ThreadPool> pool_;
    Counters counters_;
    uint64_t epoch_ = 0;
    int32_t last_generation_ = 0;
    std::vector<uint64_t> last_read_;
    std::vector<int64_t> rows_reserved_;
    std::string failure_;
    int32_t failure_culprit_ = -1;
    bool closed_ = false;
    int32_t pid_ = 0;  ///< of the process that constructed it
};

}  // namespace deepcomm::cpu
