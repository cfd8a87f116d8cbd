// SPDX-License-Identifier: Apache-2.0
// The low-latency slots of one endpoint: addresses, credits, headers, and the rank mask. A slot
// serves every num_slots-th operation; inside it every source (dispatch) or every (source node,
// returning rank) pair (combine) owns a block.
#pragma once

#include <exception>
#include <string>
#include <vector>

#include "common/error.hpp"
#include "cpu/endpoint.hpp"

namespace deepcomm::cpu {

/// Keeps the first recoverable error, so that all blocks of a slot are awaited before it is given
/// back: a late writer must not meet the slot's next user.
class FirstError {
  public:
    template <typename Body>
    void run(Body&& body) {
        try {
            body();
        } catch (const Error& error) {
            if (!is_recoverable(error)) {
                throw;
            }
            if (!first_) {
                first_ = std::current_exception();
            }
        }
    }
    bool any() const { return first_ != nullptr; }
    void rethrow() const { std::rethrow_exception(first_); }

  private:
    std::exception_ptr first_;
};

/// Who refused an operation, and why.
struct Refusal {
    int32_t rank;
    std::string message;
};

class SlotRing {
  public:
    explicit SlotRing(Endpoint& endpoint);

    const EndpointConfig& config() const { return endpoint_.config(); }

    // Mask
    void set_masked(int32_t rank, bool masked);
    bool is_masked(int32_t rank) const { return masked_[static_cast<size_t>(rank)] != 0; }
    /// Whether tokens of source reach destination: both alive, and the rank that forwards them.
    bool connected(int32_t source, int32_t destination) const;

    /// All ranks, this node's first: what a late one of them passes on need not be awaited.
    std::vector<int32_t> sources_in_wait_order() const;

    // Operations
    /// Throws InvalidArgument where the next operation's slot is still in flight.
    void check_free(OpKind kind) const;
    uint64_t open() {
        in_flight_[slot_of(++epoch_)] = 1;
        return epoch_;
    }
    /// Operations that have been opened and not closed.
    int64_t num_in_flight() const;
    /// Marks this rank's slot of epoch as read.
    void close(uint64_t epoch);
    void continue_from(const SlotRing& other);
    /// Reserves this rank's blocks for records of stride bytes; throws where memory is full.
    void reserve(int64_t stride);
    /// Waits until local rank local has room for epoch's records of stride bytes. False where it is,
    /// or becomes, masked, has refused the operation, differs, or is done with it: then nothing is to
    /// be stored there.
    bool wait_credit(int32_t local, uint64_t epoch, int64_t stride, const OpSignature& signature,
                     bool mask_late);
    /// Whether local rank local has sent rows of another dtype for epoch: it may never reserve room
    /// for ours, but must see our signature.
    bool differs(int32_t local, uint64_t epoch, const OpSignature& signature) const;

    // Blocks: index is the source rank (dispatch) or pair_index (combine)
    int32_t pair_index(int32_t source, int32_t returning_local) const {
        return config().node_of(source) * config().ranks_per_node + returning_local;
    }
    std::byte* block(int32_t local, uint64_t epoch, int32_t index, int64_t stride) const;
    BlockHeader& header(int32_t local, uint64_t epoch, int32_t index) const;
    /// Weights [max_tokens, K] that source sends to local rank local ahead of a combine.
    float* weights(int32_t local, uint64_t epoch, int32_t source) const;
    std::atomic<uint64_t>& weights_flag(int32_t local, uint64_t epoch, int32_t source) const;
    void publish(int32_t local, uint64_t epoch, int32_t index, int32_t num_rows,
                 const OpSignature& signature);
    void publish_weights(int32_t local, uint64_t epoch, int32_t source);
    /// Tells the ranks of this node what source asks for, in place of its rows: they will find that
    /// it differs.
    void forward_mismatch(uint64_t epoch, int32_t source, const OpSignature& signature);
    /// Refuses the operation of epoch in every block that this rank owes its node: its own, and
    /// those of the rail peers that it would forward.
    void abort(uint64_t epoch, OpKind kind, const std::string& message);
    /// Passes the refusal of a low-latency dispatch on to the ranks of this node, in place of the
    /// rows of source.
    void forward_abort(uint64_t epoch, int32_t source, const Refusal& refusal);
    /// Tells the ranks of this node that nothing comes from source, a masked rail peer.
    void forward_absence(uint64_t epoch, int32_t source, bool mask_late);

    /// Waits for a block of this rank. False where blamed is, or becomes, masked. Throws CommError
    /// where it refused, ConfigMismatch where its signature differs.
    bool wait_block(uint64_t epoch, int32_t index, int32_t blamed, const OpSignature& signature,
                    bool mask_late);
    /// The same for the weights of source.
    bool wait_weights(uint64_t epoch, int32_t source, const OpSignature& signature, bool mask_late);

  private:
    size_t slot_of(uint64_t epoch) const {
        return static_cast<size_t>(epoch % static_cast<uint64_t>(config().num_slots));
    }
    bool has_refused(int32_t local, uint64_t epoch, OpKind kind) const;
    bool has_room(int32_t local, uint64_t epoch) const;
    /// Waits until local rank local is done with the slot's last operation. False where it is, or
    /// becomes, masked.
    bool wait_room(int32_t local, uint64_t epoch, OpKind kind, bool mask_late = false);
    void publish_abort(int32_t local, uint64_t epoch, int32_t index, const Refusal& refusal);
    /// Rank of this node that writes what comes from source: itself, or its rail peer here.
    int32_t sender_of(int32_t source) const {
        return config().node() * config().ranks_per_node + config().local_of(source);
    }
    /// Waits for what source gives to sender_of(source). False where it is late and is masked then:
    /// the sender, which may take twice the time where it waits for source itself.
    template <typename Ready>
    bool wait_or_mask(int32_t source, OpKind kind, const char* what, bool mask_late, Ready&& ready);

    Endpoint& endpoint_;
    std::vector<uint8_t> masked_;
    std::vector<uint8_t> in_flight_;
    uint64_t epoch_ = 0;
    int64_t reserved_stride_ = 0;
};

}  // namespace deepcomm::cpu
