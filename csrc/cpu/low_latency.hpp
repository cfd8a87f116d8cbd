// SPDX-License-Identifier: Apache-2.0
// Low-latency operations on CPUs: no announcements. Records and their header arrive together in the
// send phase; the hook's part receives. A token travels once per destination rank and is expanded
// there.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cpu/combine.hpp"
#include "cpu/slot_ring.hpp"

namespace deepcomm::cpu {

class LowLatencyDispatchOp {
  public:
    /// Reads the ids and reserves memory; throws before anything is sent.
    LowLatencyDispatchOp(Endpoint& endpoint, SlotRing& ring, const DispatchArgs& args,
                         bool mask_late);

    const DispatchArgs& args() const { return args_; }
    const Routing& routing() const { return record_->routing; }
    uint64_t epoch() const { return epoch_; }
    const OpSignature& signature() const { return signature_; }
    /// Rows of x, all blocks together.
    int64_t num_out_rows() const;
    /// Takes the next epoch and stores this rank's records on the ranks of this node.
    void send();

    int64_t record_bytes() const { return record_format_.stride; }
    int64_t num_rows_to(int32_t node) const;
    void pack(int32_t node, std::byte* records);
    /// Stores a rail peer's records on the ranks of this node.
    void forward(int32_t source, int64_t num, const std::byte* records);
    /// Passes on that a rail peer refused the operation.
    void forward_abort(int32_t source, const Refusal& refusal) {
        ring_.forward_abort(epoch_, source, refusal);
    }
    /// Passes on that a rail peer asks for something else.
    void forward_mismatch(int32_t source, const OpSignature& signature) {
        ring_.forward_mismatch(epoch_, source, signature);
    }

    /// Tells this node that nothing comes from a rail peer, which is masked here.
    void forward_absence(int32_t source) { ring_.forward_absence(epoch_, source, mask_late_); }

    /// Waits for the blocks of all sources; received() is then valid.
    void receive();
    const Received& received() const { return record_->received; }
    /// Lays the rows out, and gives the slot back.
    void deliver_to(const DeliverTarget& target);
    std::shared_ptr<const DispatchRecord> record() const { return record_; }

  private:
    template <typename Read, typename Weights>
    void store(int32_t source, const Routing& routing, Read&& read, Weights&& weights);
    void store_record(const RowView& view, int32_t rank, const int32_t* ids, const float* weights,
                      std::byte* record) const;
    std::vector<uint8_t> wait_blocks();
    void take_block(int32_t source, int32_t num_rows);

    Endpoint& endpoint_;
    SlotRing& ring_;
    DispatchArgs args_;
    bool mask_late_;
    OpSignature signature_;
    layout::TokenRecord record_format_;
    uint64_t epoch_ = 0;
    std::shared_ptr<DispatchRecord> record_;
    std::vector<RowView> views_;
};

struct LowLatencyCombineArgs {
    CombineArgs combine;
    const float* source_weights = nullptr;  ///< [T, K] at the tokens' rank, sent first; or null
    bool mask_late = false;
};

class LowLatencyCombineOp {
  public:
    LowLatencyCombineOp(Endpoint& endpoint, SlotRing& ring, const LowLatencyCombineArgs& args);

    uint64_t epoch() const { return epoch_; }
    const OpSignature& signature() const { return signature_; }
    /// Takes the next epoch and sends this rank's weights, where given, to the ranks of this node.
    void open();
    int64_t num_weights_to(int32_t node) const;  ///< tokens with a destination on node
    void pack_weights(int32_t node, float* weights) const;
    /// Passes a rail peer's weights on to the ranks of this node; null: it refused.
    void forward_weights(int32_t source, const float* weights);
    /// Waits for the weights of all sources; a no-op where none are sent.
    void wait_weights();
    /// Sums each row over this rank's experts and stores it where its token's rank, or the rank that
    /// forwards to it, reads.
    void send();

    int64_t record_bytes() const { return record_format_.stride; }
    int64_t num_rows_to(int32_t source) const;  ///< tokens of a rail peer with a destination here
    /// Waits for this node's blocks of a rail peer's tokens and sums them into records.
    void pack(int32_t source, std::byte* records);
    /// Waits for this node's blocks of this rank's tokens and sums; partials[n] from node n.
    void finish(const std::vector<const std::byte*>& partials);

  private:
    void store_weights(int32_t source, const Routing& routing, const float* weights);
    std::vector<uint8_t> wait_blocks(int32_t source);

    Endpoint& endpoint_;
    SlotRing& ring_;
    LowLatencyCombineArgs args_;
    OpSignature signature_;
    layout::TokenRecord record_format_;
    uint64_t epoch_ = 0;
    std::vector<float> applied_;  ///< [N, K] weights received for the rows of this rank
};

}  // namespace deepcomm::cpu
