// SPDX-License-Identifier: Apache-2.0
// High-throughput dispatch on CPUs: announce counts, push each row straight to its final slot on
// every destination rank of the node, pack rows for other nodes once per node, wait per source.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "cpu/round.hpp"
#include "cpu/row_store.hpp"
#include "cpu/rows.hpp"
#include "layout/token_record.hpp"

namespace deepcomm::cpu {

/// Records of one routing: what combine and a cached dispatch need. Immutable once complete.
struct DispatchRecord {
    uint64_t epoch = 0;
    bool low_latency = false;
    bool complete = false;  ///< low latency: its rows have arrived
    RecvLayout recv_layout = RecvLayout::kToken;
    int32_t expert_alignment = 1;
    int64_t capacity = -1;
    Routing routing;
    Received received;
    std::vector<Routing> forwarded;  ///< per source rank of my rail on other nodes; else empty
    std::vector<std::vector<int32_t>>
        full_offsets;  ///< EXPERT starts per rank of this node, unclipped
};

struct DispatchArgs {
    RowInput input;
    RowFormat format;
    int32_t num_tokens = 0;
    int32_t num_topk = 0;
    const void* topk_idx = nullptr;
    bool topk_idx_is_int64 = false;
    const float* topk_weights = nullptr;  ///< [T, K] or null
    RecvLayout recv_layout = RecvLayout::kToken;
    int32_t expert_alignment = 1;
    int64_t capacity = -1;
    bool growable = false;
    std::shared_ptr<const DispatchRecord> cached;
};

class DispatchOp {
  public:
    /// Reads the ids and counts; throws InvalidArgument before anything is announced.
    DispatchOp(Endpoint& endpoint, const DispatchArgs& args);

    void announce();
    Round& round() { return *round_; }

    int64_t record_bytes() const { return record_format_.stride; }
    int64_t num_rows_to(int32_t node) const;
    int64_t num_rows_from(int32_t source) const;
    /// Packs rows [begin, end) of those that go to node into records.
    void pack(int32_t node, int64_t begin, int64_t end, std::byte* records);
    /// Stores num records of a rail peer, the next in its order, on the ranks of this node.
    void forward(int32_t source, int64_t num, const std::byte* records);
    /// Publishes that all rows of source (this rank, or a rail peer) have been stored on this node.
    void publish(int32_t source);
    /// After round().wait_all(): hands out the slots, stores this rank's rows on the ranks of this
    /// node, and publishes them.
    void push();

    /// Waits for the rows of all sources and records them.
    void receive();
    const DispatchArgs& args() const { return args_; }
    const Routing& routing() const { return record_->routing; }
    const Received& received() const { return record_->received; }
    /// The received rows where they lie, leasing their generation; null where they must be copied.
    std::shared_ptr<std::byte> lease_rows() const;
    /// Delivers, unless target is null, ends the operation and makes its record final.
    std::shared_ptr<const DispatchRecord> finish(const DeliverTarget* target);

  private:
    void plan();
    void assign_slots();
    int64_t rows_offset() const;
    bool rows_in_place() const { return direct(endpoint_.config().local()); }
    void deliver_to(const DeliverTarget& target);
    LandingArea area_of(int32_t local) const;
    const LandingArea& own_area() const { return store_.area(endpoint_.config().local()); }
    bool direct(int32_t local) const;
    TokenRows own_rows() const;
    void record_received();
    void find_overflow();
    std::vector<RowView> received_views() const;
    void copy_in_place_rows(const DeliverTarget& target) const;
    Routing& forwarded(int32_t source) const;

    Endpoint& endpoint_;
    DispatchArgs args_;
    layout::TokenRecord record_format_;
    RowCounts counts_;
    std::unique_ptr<Round> round_;
    Landing landing_{-1, false};
    CountTable table_;
    std::shared_ptr<DispatchRecord> record_;
    std::vector<std::unique_ptr<SlotAssigner>> rail_assigners_;
    std::vector<int64_t> num_forwarded_;
    RowStore store_;
    bool overflow_ = false;
};

}  // namespace deepcomm::cpu
