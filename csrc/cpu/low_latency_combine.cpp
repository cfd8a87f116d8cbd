// SPDX-License-Identifier: Apache-2.0
#include "cpu/low_latency.hpp"

#include <algorithm>
#include <cstring>

#include "common/error.hpp"

namespace deepcomm::cpu {

namespace {

/// Rows that the ranks of this node returned for one source, in this rank's blocks.
class BlockRows : public RowSource {
  public:
    BlockRows(const SlotRing& ring, uint64_t epoch, int32_t source,
              const layout::TokenRecord& format, const std::vector<uint8_t>& arrived)
        : ring_(ring), format_(format) {
        const EndpointConfig& config = ring.config();
        for (int32_t local = 0; local < config.ranks_per_node; ++local) {
            const int32_t index = ring.pair_index(source, local);
            blocks_.push_back(ring.block(config.local(), epoch, index, format.stride));
            num_rows_.push_back(arrived[static_cast<size_t>(local)] != 0
                                    ? ring.header(config.local(), epoch, index).num_rows
                                    : 0);
        }
    }

    const std::byte* row(const Destination& at) const override {
        const auto local = static_cast<size_t>(ring_.config().local_of(at.rank));
        return at.slot < num_rows_[local] ? blocks_[local] + at.slot * format_.stride : nullptr;
    }
    const float* weights(const Destination& at) const override {
        return reinterpret_cast<const float*>(row(at) + format_.topk_weights_offset);
    }

  private:
    const SlotRing& ring_;
    const layout::TokenRecord& format_;
    std::vector<const std::byte*> blocks_;
    std::vector<int32_t> num_rows_;
};

}  // namespace

LowLatencyCombineOp::LowLatencyCombineOp(Endpoint& endpoint, SlotRing& ring,
                                         const LowLatencyCombineArgs& args)
    : endpoint_(endpoint),
      ring_(ring),
      args_(args),
      signature_{},
      record_format_(layout::TokenRecord::make(args.combine.format.row_bytes, 0,
                                               args.combine.record->routing.num_topk)) {
    const OpKind kind = OpKind::kLowLatencyCombine;
    endpoint.check_usable(kind);
    ring.check_free(kind);
    const CombineArgs& combine = args.combine;
    signature_.kind = kind;
    signature_.dtype = combine.format.dtype;
    signature_.recv_layout = combine.record->recv_layout;
    signature_.expert_alignment = 1;
    signature_.num_topk = combine.record->routing.num_topk;
    signature_.has_weights =
        args.source_weights != nullptr || combine.outputs.topk_weights != nullptr;
    signature_.apply_weights = combine.apply_weights;
    signature_.capacity = -1;
    signature_.handle_epoch = static_cast<int64_t>(combine.record->epoch);
    DEEPCOMM_CHECK_ARG(combine.record->complete,
                       "handle: expected the hook of its dispatch to have been called");
    ring.reserve(record_format_.stride);
}

int64_t LowLatencyCombineOp::num_weights_to(int32_t node) const {
    const auto& lists = args_.combine.record->routing.node_tokens;
    return static_cast<int64_t>(lists[static_cast<size_t>(node)].size());
}

int64_t LowLatencyCombineOp::num_rows_to(int32_t source) const {
    return args_.combine.record->forwarded[static_cast<size_t>(source)].num_tokens;
}

void LowLatencyCombineOp::open() {
    epoch_ = ring_.open();
    if (args_.source_weights != nullptr) {
        store_weights(endpoint_.config().rank, args_.combine.record->routing, args_.source_weights);
    }
}

void LowLatencyCombineOp::store_weights(int32_t source, const Routing& routing,
                                        const float* weights) {
    const EndpointConfig& config = endpoint_.config();
    std::vector<float*> targets(static_cast<size_t>(config.ranks_per_node), nullptr);
    for (int32_t local = 0; local < config.ranks_per_node; ++local) {
        const int32_t rank = config.node() * config.ranks_per_node + local;
        if (ring_.connected(source, rank) &&
            ring_.wait_credit(local, epoch_, record_format_.stride, signature_, args_.mask_late)) {
            targets[static_cast<size_t>(local)] = ring_.weights(local, epoch_, source);
        }
    }
    for_each_local(config, routing, [&](int64_t token, const Destination& to) {
        float* const target = targets[static_cast<size_t>(config.local_of(to.rank))];
        if (target != nullptr) {
            std::copy_n(weights + token * routing.num_topk, routing.num_topk,
                        target + static_cast<int64_t>(to.slot) * routing.num_topk);
        }
    });
    for (int32_t local = 0; local < config.ranks_per_node; ++local) {
        if (targets[static_cast<size_t>(local)] != nullptr) {
            ring_.publish_weights(local, epoch_, source);
        }
    }
}

void LowLatencyCombineOp::pack_weights(int32_t node, float* weights) const {
    const Routing& routing = args_.combine.record->routing;
    for (const int32_t token : routing.node_tokens[static_cast<size_t>(node)]) {
        weights = std::copy_n(args_.source_weights + static_cast<int64_t>(token) * routing.num_topk,
                              routing.num_topk, weights);
    }
}

void LowLatencyCombineOp::forward_weights(int32_t source, const float* weights) {
    if (weights != nullptr) {
        store_weights(source, args_.combine.record->forwarded[static_cast<size_t>(source)],
                      weights);
        return;
    }
    for (int32_t local = 0; local < endpoint_.config().ranks_per_node; ++local) {
        ring_.publish_weights(local, epoch_, source);
    }
}

void LowLatencyCombineOp::wait_weights() {
    if (args_.source_weights == nullptr) {
        return;
    }
    const EndpointConfig& config = endpoint_.config();
    const Received& received = args_.combine.record->received;
    applied_.assign(received.topk_idx.size(), 0.0F);
    args_.combine.outputs.apply_weights = applied_.data();
    FirstError error;
    for (const int32_t source : ring_.sources_in_wait_order()) {
        error.run([&] {
            if (!ring_.connected(source, config.rank) ||
                !ring_.wait_weights(epoch_, source, signature_, args_.mask_late)) {
                return;
            }
            const int64_t first = received.first_row[static_cast<size_t>(source)];
            const int64_t last = received.first_row[static_cast<size_t>(source) + 1];
            std::copy_n(ring_.weights(config.local(), epoch_, source),
                        (last - first) * received.num_topk,
                        applied_.data() + first * received.num_topk);
        });
    }
    if (error.any()) {
        error.rethrow();
    }
}

void LowLatencyCombineOp::send() {
    const EndpointConfig& config = endpoint_.config();
    const CombineArgs& combine = args_.combine;
    const Received& received = combine.record->received;
    const bool carries = combine.outputs.topk_weights != nullptr;
    const ReturnedRows returned{combine.format, combine.record->recv_layout, received,
                                combine.outputs, endpoint_.ops()};
    for (int32_t source = 0; source < config.num_ranks; ++source) {
        const int32_t target = config.local_of(source);
        if (!ring_.connected(source, config.rank) ||
            !ring_.wait_credit(target, epoch_, record_format_.stride, signature_,
                               args_.mask_late)) {
            if (ring_.differs(target, epoch_, signature_)) {
                ring_.publish(target, epoch_, ring_.pair_index(source, config.local()), 0,
                              signature_);
            }
            continue;
        }
        const int32_t index = ring_.pair_index(source, config.local());
        std::byte* const block = ring_.block(target, epoch_, index, record_format_.stride);
        const int64_t first = received.first_row[static_cast<size_t>(source)];
        const int64_t num_rows = received.first_row[static_cast<size_t>(source) + 1] - first;
        endpoint_.pool().parallel_for(num_rows, kGrainRows, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                std::byte* const record = block + row * record_format_.stride;
                auto* const weights =
                    reinterpret_cast<float*>(record + record_format_.topk_weights_offset);
                returned.write(first + row, {record, carries ? weights : nullptr}, false);
            }
        });
        Counters& counters = endpoint_.counters();
        (target == config.local() ? counters.bytes_local : counters.bytes_node) +=
            num_rows * combine.format.row_bytes;
        ring_.publish(target, epoch_, index, static_cast<int32_t>(num_rows), signature_);
    }
}

std::vector<uint8_t> LowLatencyCombineOp::wait_blocks(int32_t source) {
    const EndpointConfig& config = endpoint_.config();
    std::vector<uint8_t> arrived;
    FirstError error;
    for (int32_t local = 0; local < config.ranks_per_node; ++local) {
        const int32_t rank = config.node() * config.ranks_per_node + local;
        bool came = false;
        error.run([&] {
            came = ring_.connected(source, rank) &&
                   ring_.wait_block(epoch_, ring_.pair_index(source, local), rank, signature_,
                                    args_.mask_late);
        });
        arrived.push_back(came ? 1 : 0);
    }
    if (error.any()) {
        if (source == config.rank) {  // the last wait of the operation
            ring_.close(epoch_);
        }
        error.rethrow();
    }
    return arrived;
}

void LowLatencyCombineOp::pack(int32_t source, std::byte* records) {
    const Routing& routing = args_.combine.record->forwarded[static_cast<size_t>(source)];
    const BlockRows rows(ring_, epoch_, source, record_format_, wait_blocks(source));
    if (routing.num_tokens == 0) {
        return;
    }
    sum_node(endpoint_, routing, args_.combine.format, rows, {0, routing.num_tokens}, records);
    endpoint_.counters().bytes_network += routing.num_tokens * record_format_.stride;
}

void LowLatencyCombineOp::finish(const std::vector<const std::byte*>& partials) {
    const CombineArgs& combine = args_.combine;
    const int32_t own = endpoint_.config().rank;
    const BlockRows rows(ring_, epoch_, own, record_format_, wait_blocks(own));
    sum_tokens(endpoint_, {*combine.record, combine.format, rows, {record_format_, partials}},
               combine.target, {0, combine.record->routing.num_tokens});
    ring_.close(epoch_);
    ++endpoint_.counters().num_combines;
}

}  // namespace deepcomm::cpu
