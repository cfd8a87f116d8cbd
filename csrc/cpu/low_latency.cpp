// SPDX-License-Identifier: Apache-2.0
#include "cpu/low_latency.hpp"

#include <algorithm>
#include <cstring>

#include "common/error.hpp"

namespace deepcomm::cpu {

namespace {

const int32_t* ids_of(const Routing& routing, int64_t token) {
    return routing.topk_idx.data() + token * routing.num_topk;
}

/// Calls visit(token, destination) for every destination of routing on this node.
template <typename Visit>
void for_each_local(const EndpointConfig& config, const Routing& routing, int64_t begin,
                    int64_t end, Visit&& visit) {
    for (int64_t token = begin; token < end; ++token) {
        const auto at = static_cast<size_t>(token);
        for (int32_t index = routing.first_destination[at];
             index < routing.first_destination[at + 1]; ++index) {
            const Destination& to = routing.destinations[static_cast<size_t>(index)];
            if (config.is_local(to.rank)) {
                visit(token, to);
            }
        }
    }
}

}  // namespace

// ---- dispatch ------------------------------------------------------------------------------------

LowLatencyDispatchOp::LowLatencyDispatchOp(Endpoint& endpoint, SlotRing& ring,
                                           const DispatchArgs& args, bool mask_late)
    : endpoint_(endpoint),
      ring_(ring),
      args_(args),
      mask_late_(mask_late),
      signature_{},
      record_format_(
          layout::TokenRecord::make(args.format.row_bytes, args.format.scale_bytes, args.num_topk)),
      record_(std::make_shared<DispatchRecord>()) {
    const OpKind kind = OpKind::kLowLatencyDispatch;
    endpoint.check_usable(kind);
    ring.check_free(kind);
    DEEPCOMM_CHECK_ARG(args.num_tokens <= endpoint.config().max_tokens,
                       "x: expected at most max_tokens_per_rank = %d tokens, got %d",
                       endpoint.config().max_tokens, args.num_tokens);
    signature_.kind = kind;
    signature_.dtype = args.format.dtype;
    signature_.scale_format = args.format.scale_format;
    signature_.recv_layout = args.recv_layout;
    signature_.expert_alignment = 1;
    signature_.num_topk = args.num_topk;
    signature_.has_weights = args.topk_weights != nullptr;
    signature_.capacity = -1;
    record_->low_latency = true;
    record_->recv_layout = args.recv_layout;
    record_->routing.num_tokens = args.num_tokens;
    record_->routing.num_topk = args.num_topk;
    count_rows(endpoint.config(), args.topk_idx, args.topk_idx_is_int64, record_->routing);
    assign_source_slots(endpoint.config(), record_->routing);
    record_->forwarded.resize(static_cast<size_t>(endpoint.config().num_ranks));
}

void LowLatencyDispatchOp::send() {
    ring_.reserve(record_format_.stride);
    epoch_ = ring_.open();
    record_->epoch = epoch_;
    RowReader reader(args_.input, args_.format, endpoint_.ops());
    store(
        endpoint_.config().rank, record_->routing,
        [&](int64_t token) { return reader.read(token); },
        [&](int64_t token) {
            return args_.topk_weights == nullptr ? nullptr
                                                 : args_.topk_weights + token * args_.num_topk;
        });
}

template <typename Read, typename Weights>
void LowLatencyDispatchOp::store(int32_t source, const Routing& routing, Read&& read,
                                 Weights&& weights) {
    const EndpointConfig& config = endpoint_.config();
    const int64_t stride = record_format_.stride;
    const auto num_local = static_cast<size_t>(config.ranks_per_node);
    std::vector<std::byte*> blocks(num_local, nullptr);
    std::vector<int32_t> num_rows(num_local, 0);
    for (int32_t local = 0; local < config.ranks_per_node; ++local) {
        const int32_t rank = config.node() * config.ranks_per_node + local;
        if (ring_.connected(source, rank) &&
            ring_.wait_credit(local, epoch_, stride, signature_.kind, mask_late_)) {
            blocks[static_cast<size_t>(local)] = ring_.block(local, epoch_, source, stride);
        }
    }
    Counters& counters = endpoint_.counters();
    int64_t last_token = -1;
    RowView view{};
    for_each_local(
        config, routing, 0, routing.num_tokens, [&](int64_t token, const Destination& to) {
            const auto local = static_cast<size_t>(config.local_of(to.rank));
            if (blocks[local] == nullptr) {
                return;
            }
            if (token != last_token) {
                view = read(token);
                last_token = token;
            }
            store_record(view, to.rank, ids_of(routing, token), weights(token),
                         blocks[local] + to.slot * stride);
            ++num_rows[local];
            (to.rank == config.rank ? counters.bytes_local : counters.bytes_node) += stride;
        });
    for (int32_t local = 0; local < config.ranks_per_node; ++local) {
        if (blocks[static_cast<size_t>(local)] != nullptr) {
            ring_.publish(local, epoch_, source, num_rows[static_cast<size_t>(local)], signature_);
        }
    }
}

void LowLatencyDispatchOp::store_record(const RowView& view, int32_t rank, const int32_t* ids,
                                        const float* weights, std::byte* record) const {
    endpoint_.ops().copy(record, view.row, args_.format.row_bytes);
    if (args_.format.scale_bytes > 0) {
        std::memcpy(record + record_format_.scales_offset, view.scales,
                    static_cast<size_t>(args_.format.scale_bytes));
    }
    const int32_t num_local = endpoint_.config().num_local_experts();
    auto* const to_ids = reinterpret_cast<int32_t*>(record + record_format_.topk_idx_offset);
    auto* const to_weights = reinterpret_cast<float*>(record + record_format_.topk_weights_offset);
    for (int32_t column = 0; column < args_.num_topk; ++column) {
        const bool here = ids[column] >= 0 && ids[column] / num_local == rank;
        to_ids[column] = here ? ids[column] % num_local : -1;
        to_weights[column] = here && weights != nullptr ? weights[column] : 0.0F;
    }
}

int64_t LowLatencyDispatchOp::num_rows_to(int32_t node) const {
    return static_cast<int64_t>(record_->routing.node_tokens[static_cast<size_t>(node)].size());
}

void LowLatencyDispatchOp::pack(int32_t node, std::byte* records) {
    const std::vector<int32_t>& tokens = record_->routing.node_tokens[static_cast<size_t>(node)];
    RowReader reader(args_.input, args_.format, endpoint_.ops());
    const auto ids_bytes = static_cast<size_t>(args_.num_topk) * 4;
    for (size_t index = 0; index < tokens.size(); ++index) {
        std::byte* const record = records + static_cast<int64_t>(index) * record_format_.stride;
        const RowView view = reader.read(tokens[index]);
        std::memcpy(record, view.row, static_cast<size_t>(args_.format.row_bytes));
        if (args_.format.scale_bytes > 0) {
            std::memcpy(record + record_format_.scales_offset, view.scales,
                        static_cast<size_t>(args_.format.scale_bytes));
        }
        std::memcpy(record + record_format_.topk_idx_offset,
                    ids_of(record_->routing, tokens[index]), ids_bytes);
        if (args_.topk_weights != nullptr) {
            std::memcpy(record + record_format_.topk_weights_offset,
                        args_.topk_weights + static_cast<int64_t>(tokens[index]) * args_.num_topk,
                        ids_bytes);
        }
    }
    endpoint_.counters().bytes_network +=
        static_cast<int64_t>(tokens.size()) * record_format_.stride;
}

void LowLatencyDispatchOp::forward(int32_t source, int64_t num, const std::byte* records) {
    Routing& routing = record_->forwarded[static_cast<size_t>(source)];
    routing.num_topk = args_.num_topk;
    routing.num_tokens = static_cast<int32_t>(num);
    for (int64_t index = 0; index < num; ++index) {
        const auto* const ids = reinterpret_cast<const int32_t*>(
            records + index * record_format_.stride + record_format_.topk_idx_offset);
        routing.topk_idx.insert(routing.topk_idx.end(), ids, ids + args_.num_topk);
    }
    assign_source_slots(endpoint_.config(), routing, endpoint_.config().node());
    store(
        source, routing,
        [&](int64_t token) {
            const std::byte* const record = records + token * record_format_.stride;
            return RowView{record, record + record_format_.scales_offset};
        },
        [&](int64_t token) {
            return reinterpret_cast<const float*>(records + token * record_format_.stride +
                                                  record_format_.topk_weights_offset);
        });
}

void LowLatencyDispatchOp::forward_abort(int32_t source, const std::string& message) {
    for (int32_t local = 0; local < endpoint_.config().ranks_per_node; ++local) {
        ring_.publish_abort(local, epoch_, source, message);
    }
}

void LowLatencyDispatchOp::receive() {
    const EndpointConfig& config = endpoint_.config();
    Received& received = record_->received;
    received.num_topk = args_.num_topk;
    received.first_row.push_back(0);
    FirstError error;
    for (int32_t source = 0; source < config.num_ranks; ++source) {
        int32_t num_rows = 0;
        error.run([&] {
            if (ring_.connected(source, config.rank) &&
                ring_.wait_block(epoch_, source, source, signature_, mask_late_)) {
                num_rows = ring_.header(config.local(), epoch_, source).num_rows;
                take_block(source, num_rows);
            }
        });
        received.first_row.push_back(received.first_row.back() + num_rows);
    }
    if (error.any()) {
        ring_.close(epoch_);
        error.rethrow();
    }
    received.num_rows = received.first_row.back();
    place_rows(config, args_.recv_layout, -1, {}, received);
    if (args_.recv_layout == RecvLayout::kToken) {
        received.out_rows = config.shape().max_rows();
    }
}

void LowLatencyDispatchOp::take_block(int32_t source, int32_t num_rows) {
    const std::byte* const block =
        ring_.block(endpoint_.config().local(), epoch_, source, record_format_.stride);
    Received& received = record_->received;
    for (int32_t row = 0; row < num_rows; ++row) {
        const std::byte* const record = block + row * record_format_.stride;
        const auto* const ids =
            reinterpret_cast<const int32_t*>(record + record_format_.topk_idx_offset);
        received.topk_idx.insert(received.topk_idx.end(), ids, ids + args_.num_topk);
        if (args_.topk_weights != nullptr) {
            const auto* const weights =
                reinterpret_cast<const float*>(record + record_format_.topk_weights_offset);
            received.topk_weights.insert(received.topk_weights.end(), weights,
                                         weights + args_.num_topk);
        }
        views_.push_back({record, record + record_format_.scales_offset});
    }
}

void LowLatencyDispatchOp::deliver_to(const DeliverTarget& target) {
    deliver(args_.format, args_.recv_layout, record_->received, views_, target, endpoint_.ops(),
            endpoint_.pool());
    ring_.close(epoch_);
    Counters& counters = endpoint_.counters();
    ++counters.num_dispatches;
    counters.tokens_sent += args_.num_tokens;
    counters.tokens_received += record_->received.num_rows;
}

// ---- combine -------------------------------------------------------------------------------------

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
}

int64_t LowLatencyCombineOp::num_weights_to(int32_t node) const {
    const auto& lists = args_.combine.record->routing.node_tokens;
    return static_cast<int64_t>(lists[static_cast<size_t>(node)].size());
}

int64_t LowLatencyCombineOp::num_weights_from(int32_t source) const {
    return args_.combine.record->forwarded[static_cast<size_t>(source)].num_tokens;
}

void LowLatencyCombineOp::open() {
    ring_.reserve(record_format_.stride);
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
        if (ring_.connected(source, rank) && ring_.wait_credit(local, epoch_, record_format_.stride,
                                                               signature_.kind, args_.mask_late)) {
            targets[static_cast<size_t>(local)] = ring_.weights(local, epoch_, source);
        }
    }
    for_each_local(config, routing, 0, routing.num_tokens,
                   [&](int64_t token, const Destination& to) {
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
    for (int32_t source = 0; source < config.num_ranks; ++source) {
        if (!ring_.connected(source, config.rank) ||
            !ring_.wait_weights(epoch_, source, signature_, args_.mask_late)) {
            continue;
        }
        const int64_t first = received.first_row[static_cast<size_t>(source)];
        const int64_t last = received.first_row[static_cast<size_t>(source) + 1];
        std::copy_n(ring_.weights(config.local(), epoch_, source),
                    (last - first) * received.num_topk,
                    applied_.data() + first * received.num_topk);
    }
    args_.combine.outputs.apply_weights = applied_.data();
}

void LowLatencyCombineOp::send() {
    const EndpointConfig& config = endpoint_.config();
    const CombineArgs& combine = args_.combine;
    const Received& received = combine.record->received;
    const bool carries = combine.outputs.topk_weights != nullptr;
    for (int32_t source = 0; source < config.num_ranks; ++source) {
        const int32_t target = config.local_of(source);
        if (!ring_.connected(source, config.rank) ||
            !ring_.wait_credit(target, epoch_, record_format_.stride, signature_.kind,
                               args_.mask_late)) {
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
                return_row(combine.format, combine.record->recv_layout, received, first + row,
                           combine.outputs, {record, carries ? weights : nullptr}, endpoint_.ops(),
                           false);
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
    sum_node(endpoint_, routing, args_.combine.format, rows, 0, routing.num_tokens, records);
    endpoint_.counters().bytes_network += routing.num_tokens * record_format_.stride;
}

void LowLatencyCombineOp::finish(const std::vector<const std::byte*>& partials) {
    const CombineArgs& combine = args_.combine;
    const int32_t own = endpoint_.config().rank;
    const BlockRows rows(ring_, epoch_, own, record_format_, wait_blocks(own));
    sum_tokens(endpoint_, *combine.record, combine.format, rows, {record_format_, partials},
               combine.target, {0, combine.record->routing.num_tokens});
    ring_.close(epoch_);
    ++endpoint_.counters().num_combines;
}

}  // namespace deepcomm::cpu
