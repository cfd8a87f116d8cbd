// SPDX-License-Identifier: Apache-2.0
#include "cpu/low_latency.hpp"

#include <algorithm>
#include <cstring>

#include "common/error.hpp"

namespace deepcomm::cpu {

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
    ring.reserve(record_format_.stride);
}

int64_t LowLatencyDispatchOp::num_out_rows() const {
    const layout::SegmentShape shape = endpoint_.config().shape();
    const bool by_token = args_.recv_layout == RecvLayout::kToken;
    return by_token ? shape.max_rows() : shape.num_local_experts() * shape.max_rows();
}

void LowLatencyDispatchOp::send() {
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
            ring_.wait_credit(local, epoch_, stride, signature_, mask_late_)) {
            blocks[static_cast<size_t>(local)] = ring_.block(local, epoch_, source, stride);
        } else if (ring_.connected(source, rank) && ring_.differs(local, epoch_, signature_)) {
            ring_.publish(local, epoch_, source, 0, signature_);
        }
    }
    Counters& counters = endpoint_.counters();
    int64_t last_token = -1;
    RowView view{};
    for_each_local(config, routing, [&](int64_t token, const Destination& to) {
        const auto local = static_cast<size_t>(config.local_of(to.rank));
        if (blocks[local] == nullptr) {
            return;
        }
        if (token != last_token) {
            view = read(token);
            last_token = token;
        }
        store_record(view, to.rank, routing.ids(token), weights(token),
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
    for (size_t index = 0; index < tokens.size(); ++index) {
        const int32_t token = tokens[index];
        const float* const weights =
            args_.topk_weights == nullptr
                ? nullptr
                : args_.topk_weights + static_cast<int64_t>(token) * args_.num_topk;
        pack_record(record_format_,
                    {reader.read(token), record_->routing.ids(token), weights, args_.num_topk},
                    records + static_cast<int64_t>(index) * record_format_.stride);
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

std::vector<uint8_t> LowLatencyDispatchOp::wait_blocks() {
    const EndpointConfig& config = endpoint_.config();
    std::vector<uint8_t> arrived(static_cast<size_t>(config.num_ranks), 0);
    FirstError error;
    for (const int32_t source : ring_.sources_in_wait_order()) {
        error.run([&] {
            const bool came = ring_.connected(source, config.rank) &&
                              ring_.wait_block(epoch_, source, source, signature_, mask_late_);
            arrived[static_cast<size_t>(source)] = came ? 1 : 0;
        });
    }
    if (error.any()) {
        ring_.close(epoch_);
        error.rethrow();
    }
    return arrived;
}

void LowLatencyDispatchOp::receive() {
    const EndpointConfig& config = endpoint_.config();
    Received& received = record_->received;
    received.num_topk = args_.num_topk;
    received.first_row.push_back(0);
    const std::vector<uint8_t> arrived = wait_blocks();
    for (int32_t source = 0; source < config.num_ranks; ++source) {
        int32_t num_rows = 0;
        if (arrived[static_cast<size_t>(source)] != 0) {
            num_rows = ring_.header(config.local(), epoch_, source).num_rows;
            take_block(source, num_rows);
        }
        received.first_row.push_back(received.first_row.back() + num_rows);
    }
    received.num_rows = received.first_row.back();
    place_rows(config, args_.recv_layout, -1, {}, received);
    if (args_.recv_layout == RecvLayout::kToken) {
        received.out_rows = num_out_rows();
    }
    record_->complete = true;
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
    deliver({args_.format, args_.recv_layout, record_->received, views_, false}, target,
            endpoint_.ops(), endpoint_.pool());
    ring_.close(epoch_);
    Counters& counters = endpoint_.counters();
    ++counters.num_dispatches;
    counters.tokens_sent += args_.num_tokens;
    counters.tokens_received += record_->received.num_rows;
}

}  // namespace deepcomm::cpu
