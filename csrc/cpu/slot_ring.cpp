// SPDX-License-Identifier: Apache-2.0
#include "cpu/slot_ring.hpp"

#include <algorithm>
#include <numeric>

#include "common/error.hpp"

namespace deepcomm::cpu {

SlotRing::SlotRing(Endpoint& endpoint)
    : endpoint_(endpoint),
      masked_(static_cast<size_t>(endpoint.config().num_ranks), 0),
      in_flight_(static_cast<size_t>(endpoint.config().num_slots), 0) {}

void SlotRing::set_masked(int32_t rank, bool masked) {
    masked_[static_cast<size_t>(rank)] = masked ? 1 : 0;
    if (config().is_local(rank)) {
        endpoint_.set_ignored(config().local_of(rank), masked);
    }
}

bool SlotRing::connected(int32_t source, int32_t destination) const {
    const int32_t via =
        config().node_of(destination) * config().ranks_per_node + config().local_of(source);
    return !is_masked(source) && !is_masked(destination) && !is_masked(via);
}

std::vector<int32_t> SlotRing::sources_in_wait_order() const {
    std::vector<int32_t> sources(static_cast<size_t>(config().num_ranks));
    std::iota(sources.begin(), sources.end(), 0);
    std::stable_partition(sources.begin(), sources.end(),
                          [&](int32_t source) { return config().is_local(source); });
    return sources;
}

void SlotRing::check_free(OpKind kind) const {
    DEEPCOMM_CHECK_ARG(config().num_slots > 0,
                       "%s: the buffer was created with num_low_latency_slots = 0", op_name(kind));
    DEEPCOMM_CHECK_ARG(in_flight_[slot_of(epoch_ + 1)] == 0,
                       "%s: expected at most num_low_latency_slots = %d operations in flight: call "
                       "the hook of the oldest first",
                       op_name(kind), config().num_slots);
}

int64_t SlotRing::num_in_flight() const {
    return std::count(in_flight_.begin(), in_flight_.end(), uint8_t{1});
}

void SlotRing::close(uint64_t epoch) {
    in_flight_[slot_of(epoch)] = 0;
    endpoint_.own_control().slot_done[slot_of(epoch)].store(epoch, std::memory_order_release);
    endpoint_.ring_all();
}

void SlotRing::continue_from(const SlotRing& other) {
    masked_ = other.masked_;
    for (int32_t rank = 0; rank < config().num_ranks; ++rank) {
        set_masked(rank, is_masked(rank));
    }
}

void SlotRing::reserve(int64_t stride) {
    if (stride > reserved_stride_) {
        const layout::SegmentLayout& map = endpoint_.map();
        const int64_t num_bytes = config().shape().max_rows() * stride;
        DEEPCOMM_ASSERT(num_bytes <= map.block_capacity, "record of %lld bytes",
                        static_cast<long long>(stride));
        const int64_t held_bytes = config().shape().max_rows() * reserved_stride_;
        std::vector<Segment::Range> ranges;
        for (int32_t slot = 0; slot < config().num_slots; ++slot) {
            const int64_t begin = map.slot_begin(slot);
            if (reserved_stride_ == 0) {
                ranges.push_back({begin, map.slot_blocks});
            }
            ranges.push_back({begin + map.slot_blocks + held_bytes, num_bytes - held_bytes});
        }
        endpoint_.segment().reserve(ranges);
        reserved_stride_ = stride;
        endpoint_.own_control().block_stride.store(static_cast<uint64_t>(stride),
                                                   std::memory_order_release);
        endpoint_.ring_all();
    }
}

std::byte* SlotRing::block(int32_t local, uint64_t epoch, int32_t index, int64_t stride) const {
    const layout::SegmentLayout& map = endpoint_.map();
    return endpoint_.base(local) + map.slot_begin(static_cast<int32_t>(slot_of(epoch))) +
           map.slot_blocks + static_cast<int64_t>(index) * config().max_tokens * stride;
}

BlockHeader& SlotRing::header(int32_t local, uint64_t epoch, int32_t index) const {
    const int64_t at = static_cast<int64_t>(slot_of(epoch)) * config().num_ranks + index;
    return *reinterpret_cast<BlockHeader*>(endpoint_.base(local) + endpoint_.map().block_headers +
                                           at * layout::kBlockHeaderBytes);
}

float* SlotRing::weights(int32_t local, uint64_t epoch, int32_t source) const {
    std::byte* const begin =
        endpoint_.base(local) + endpoint_.map().slot_begin(static_cast<int32_t>(slot_of(epoch)));
    return reinterpret_cast<float*>(begin) +
           static_cast<int64_t>(source) * config().max_tokens * config().num_topk;
}

std::atomic<uint64_t>& SlotRing::weights_flag(int32_t local, uint64_t epoch, int32_t source) const {
    const int64_t at = static_cast<int64_t>(slot_of(epoch)) * config().num_ranks + source;
    return *reinterpret_cast<std::atomic<uint64_t>*>(
        endpoint_.base(local) + endpoint_.map().weight_flags + at * layout::kCacheLine);
}

void SlotRing::publish(int32_t local, uint64_t epoch, int32_t index, int32_t num_rows,
                       const OpSignature& signature) {
    BlockHeader& head = header(local, epoch, index);
    head.status = OpStatus::kOk;
    head.signature = signature;
    head.num_rows = num_rows;
    head.epoch.store(epoch, std::memory_order_release);
    ring_doorbell(endpoint_.control(local));
}

void SlotRing::publish_abort(int32_t local, uint64_t epoch, int32_t index, const Refusal& refusal) {
    BlockHeader& head = header(local, epoch, index);
    head.status = OpStatus::kAborted;
    head.num_rows = 0;
    head.refused_by = refusal.rank;
    copy_message(head.message, refusal.message);
    head.epoch.store(epoch, std::memory_order_release);
    ring_doorbell(endpoint_.control(local));
}

void SlotRing::publish_weights(int32_t local, uint64_t epoch, int32_t source) {
    weights_flag(local, epoch, source).store(epoch, std::memory_order_release);
    ring_doorbell(endpoint_.control(local));
}

void SlotRing::abort(uint64_t epoch, OpKind kind, const std::string& message) {
    const Refusal refusal{config().rank, message};
    for (int32_t local = 0; local < config().ranks_per_node; ++local) {
        if (!wait_room(local, epoch, kind)) {
            continue;
        }
        const bool combines = kind == OpKind::kLowLatencyCombine;
        // All flags before any header: who waits for weights takes a header without a flag for a
        // rank that gives none.
        for (int32_t node = 0; combines && node < config().num_nodes(); ++node) {
            publish_weights(local, epoch, node * config().ranks_per_node + config().local());
        }
        for (int32_t node = 0; node < config().num_nodes(); ++node) {
            const int32_t first = node * config().ranks_per_node;
            const int32_t index =
                combines ? pair_index(first + local, config().local()) : first + config().local();
            publish_abort(local, epoch, index, refusal);
        }
    }
}

void SlotRing::forward_mismatch(uint64_t epoch, int32_t source, const OpSignature& signature) {
    for (int32_t local = 0; local < config().ranks_per_node; ++local) {
        if (wait_room(local, epoch, OpKind::kLowLatencyDispatch)) {
            publish(local, epoch, source, 0, signature);
        }
    }
}

void SlotRing::forward_abort(uint64_t epoch, int32_t source, const Refusal& refusal) {
    for (int32_t local = 0; local < config().ranks_per_node; ++local) {
        if (wait_room(local, epoch, OpKind::kLowLatencyDispatch)) {
            publish_abort(local, epoch, source, refusal);
        }
    }
}

void SlotRing::forward_absence(uint64_t epoch, int32_t source, bool mask_late) {
    for (int32_t local = 0; local < config().ranks_per_node; ++local) {
        if (wait_room(local, epoch, OpKind::kLowLatencyDispatch, mask_late)) {
            BlockHeader& head = header(local, epoch, source);
            head.status = OpStatus::kAbsent;
            head.num_rows = 0;
            head.epoch.store(epoch, std::memory_order_release);
            ring_doorbell(endpoint_.control(local));
        }
    }
}

template <typename Ready>
bool SlotRing::wait_or_mask(int32_t source, OpKind kind, const char* what, bool mask_late,
                            Ready&& ready) {
    const auto wait = [&] {
        endpoint_.wait_on(config().local_of(source), source, kind, what, ready);
    };
    endpoint_.set_tolerant(mask_late);  // another rank's failure is no reason to mask this one
    try {
        try {
            wait();
        } catch (const CommTimeout&) {
            if (!mask_late || config().is_local(source)) {
                throw;
            }
            wait();  // until now the sender may have waited for source
        }
    } catch (const CommError&) {  // late or lost
        endpoint_.set_tolerant(false);
        if (!mask_late) {
            throw;
        }
        set_masked(sender_of(source), true);
        return false;
    } catch (...) {
        endpoint_.set_tolerant(false);
        throw;
    }
    endpoint_.set_tolerant(false);
    return true;
}

bool SlotRing::has_refused(int32_t local, uint64_t epoch, OpKind kind) const {
    const int32_t rank = config().node() * config().ranks_per_node + local;
    const int32_t index =
        kind == OpKind::kLowLatencyDispatch ? rank : pair_index(config().rank, local);
    const BlockHeader& head = header(config().local(), epoch, index);
    return head.epoch.load(std::memory_order_acquire) >= epoch && head.status == OpStatus::kAborted;
}

bool SlotRing::has_room(int32_t local, uint64_t epoch) const {
    const uint64_t done =
        endpoint_.control(local).slot_done[slot_of(epoch)].load(std::memory_order_acquire);
    return done + static_cast<uint64_t>(config().num_slots) >= epoch;
}

bool SlotRing::wait_room(int32_t local, uint64_t epoch, OpKind kind, bool mask_late) {
    const int32_t rank = config().node() * config().ranks_per_node + local;
    return !is_masked(rank) && wait_or_mask(rank, kind, "room in its slot", mask_late,
                                            [&] { return has_room(local, epoch); });
}

bool SlotRing::differs(int32_t local, uint64_t epoch, const OpSignature& signature) const {
    const int32_t rank = config().node() * config().ranks_per_node + local;
    const int32_t index =
        signature.kind == OpKind::kLowLatencyDispatch ? rank : pair_index(config().rank, local);
    const BlockHeader& head = header(config().local(), epoch, index);
    return head.epoch.load(std::memory_order_acquire) == epoch && head.status == OpStatus::kOk &&
           head.signature.dtype != signature.dtype;
}

bool SlotRing::wait_credit(int32_t local, uint64_t epoch, int64_t stride,
                           const OpSignature& signature, bool mask_late) {
    const OpKind kind = signature.kind;
    const Control& target = endpoint_.control(local);
    const int32_t rank = config().node() * config().ranks_per_node + local;
    if (is_masked(rank)) {
        return false;
    }
    bool refused = false;
    const bool came = wait_or_mask(rank, kind, "room in its slot", mask_late, [&] {
        const bool reserved =
            target.block_stride.load(std::memory_order_acquire) >= static_cast<uint64_t>(stride);
        // A slot that is done with this epoch takes nothing more: this rank was masked there.
        const uint64_t done = target.slot_done[slot_of(epoch)].load(std::memory_order_acquire);
        refused =
            has_refused(local, epoch, kind) || differs(local, epoch, signature) || done >= epoch;
        return refused || (reserved && has_room(local, epoch));
    });
    return came && !refused;
}

bool SlotRing::wait_block(uint64_t epoch, int32_t index, int32_t blamed,
                          const OpSignature& signature, bool mask_late) {
    if (is_masked(blamed)) {
        return false;
    }
    const BlockHeader& head = header(config().local(), epoch, index);
    const bool came = wait_or_mask(blamed, signature.kind, "its rows", mask_late, [&] {
        return head.epoch.load(std::memory_order_acquire) >= epoch;
    });
    if (!came) {
        return false;
    }
    if (head.status == OpStatus::kAborted) {
        throw CommError(
            format("%s: rank %d: rank %d refused the operation: %s", op_name(signature.kind),
                   config().rank, head.refused_by, head.message),
            head.refused_by);
    }
    if (head.status == OpStatus::kAbsent) {
        if (mask_late) {
            set_masked(blamed, true);
        }
        return false;
    }
    check_same_signature(signature, config().rank, head.signature, blamed);
    return true;
}

bool SlotRing::wait_weights(uint64_t epoch, int32_t source, const OpSignature& signature,
                            bool mask_late) {
    if (is_masked(source)) {
        return false;
    }
    const auto& flag = weights_flag(config().local(), epoch, source);
    // They come from a rank of this node, whose rows follow all weights: rows alone mean that it was
    // called without weights.
    const int32_t local = config().local_of(source);
    const BlockHeader& head = header(config().local(), epoch, pair_index(config().rank, local));
    const bool came = wait_or_mask(source, signature.kind, "its weights", mask_late, [&] {
        return flag.load(std::memory_order_acquire) >= epoch ||
               head.epoch.load(std::memory_order_acquire) >= epoch;
    });
    if (came && flag.load(std::memory_order_acquire) < epoch) {
        const int32_t sender = config().node() * config().ranks_per_node + local;
        return wait_block(epoch, pair_index(config().rank, local), sender, signature, mask_late);
    }
    return came;
}

}  // namespace deepcomm::cpu
