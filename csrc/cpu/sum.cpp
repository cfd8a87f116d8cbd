// SPDX-License-Identifier: Apache-2.0
#include "cpu/sum.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace deepcomm::cpu {

namespace {

constexpr int32_t kMaxRows = kMaxTopk;

bool is_lost(const DispatchRecord& record, int64_t token) {
    if (record.capacity < 0) {
        return false;
    }
    const Routing& routing = record.routing;
    if (record.recv_layout == RecvLayout::kToken) {
        const auto at = static_cast<size_t>(token);
        return std::any_of(routing.destinations.begin() + routing.first_destination[at],
                           routing.destinations.begin() + routing.first_destination[at + 1],
                           [&](const Destination& to) { return to.slot >= record.capacity; });
    }
    const auto first = routing.expert_slots.begin() + token * routing.num_topk;
    return std::any_of(first, first + routing.num_topk,
                       [&](int32_t slot) { return slot >= record.capacity; });
}

void fill_nan(const RowFormat& format, std::byte* out) {
    if (format.dtype == DType::kF32) {
        std::fill_n(reinterpret_cast<float*>(out), format.hidden,
                    std::numeric_limits<float>::quiet_NaN());
    } else {
        const uint16_t nan = format.dtype == DType::kBf16 ? 0x7FC0 : 0x7E00;
        std::fill_n(reinterpret_cast<uint16_t*>(out), format.hidden, nan);
    }
}

/// The rows of one sum, grouped by node.
struct SumRows {
    const void* rows[kMaxRows];
    int32_t group_sizes[kMaxRows];
    int32_t num_rows = 0;
    int32_t num_groups = 0;

    void open_group() { group_sizes[num_groups++] = 0; }
    void add(const std::byte* row) {
        rows[num_rows++] = row;
        ++group_sizes[num_groups - 1];
    }
};

ReduceArgs reduce_args(const RowFormat& format, const SumRows& sum, std::byte* dst) {
    ReduceArgs args{};
    args.dst = dst;
    args.dtype = format.dtype;
    args.num_elements = format.hidden;
    args.rows = sum.rows;
    args.group_sizes = sum.group_sizes;
    args.num_groups = sum.num_groups;
    return args;
}

/// Walks tokens and, beside each, its index in every other node's list.
class TokenSummer {
  public:
    TokenSummer(const EndpointConfig& config, const DispatchRecord& record, const RowSource& source,
                const NodePartials& partials, int64_t first_token)
        : config_(config), record_(record), source_(source), partials_(partials) {
        for (const auto& tokens : record.routing.node_tokens) {
            next_.push_back(std::lower_bound(tokens.begin(), tokens.end(), first_token) -
                            tokens.begin());
        }
    }

    /// Collects the rows of token, nodes ascending, and its carried weights. Tokens ascend.
    SumRows collect(int64_t token, float* weights) {
        SumRows sum;
        const Routing& routing = record_.routing;
        const auto at = static_cast<size_t>(token);
        int32_t node = -1;
        for (int32_t index = routing.first_destination[at];
             index < routing.first_destination[at + 1]; ++index) {
            const Destination& to = routing.destinations[static_cast<size_t>(index)];
            const bool new_node = config_.node_of(to.rank) != node;
            if (new_node) {
                node = config_.node_of(to.rank);
                sum.open_group();
            }
            if (node == config_.node()) {
                add_local(token, to, sum, weights);
            } else if (new_node) {
                add_partial(token, node, sum, weights);
            }
        }
        return sum;
    }

  private:
    void add_local(int64_t token, const Destination& to, SumRows& sum, float* weights) {
        const std::byte* const row = source_.row(to);
        if (row == nullptr) {
            return;
        }
        sum.add(row);
        take_weights(token, source_.weights(to), to.rank, to.rank + 1, weights);
    }

    void add_partial(int64_t token, int32_t node, SumRows& sum, float* weights) {
        const auto at = static_cast<size_t>(node);
        const int64_t index = next_[at]++;
        if (partials_.records[at] == nullptr) {
            return;
        }
        const std::byte* const partial = partials_.records[at] + index * partials_.format.stride;
        sum.add(partial);
        const auto* const carried =
            reinterpret_cast<const float*>(partial + partials_.format.topk_weights_offset);
        const int32_t first_rank = node * config_.ranks_per_node;
        take_weights(token, carried, first_rank, first_rank + config_.ranks_per_node, weights);
    }

    /// Takes the weights of the token's experts on ranks [first_rank, last_rank).
    void take_weights(int64_t token, const float* carried, int32_t first_rank, int32_t last_rank,
                      float* weights) const {
        if (weights == nullptr || carried == nullptr) {
            return;
        }
        const Routing& routing = record_.routing;
        const int32_t* const ids = routing.topk_idx.data() + token * routing.num_topk;
        for (int32_t column = 0; column < routing.num_topk; ++column) {
            const int32_t owner = ids[column] < 0 ? -1 : ids[column] / config_.num_local_experts();
            if (owner >= first_rank && owner < last_rank) {
                weights[column] = carried[column];
            }
        }
    }

    const EndpointConfig& config_;
    const DispatchRecord& record_;
    const RowSource& source_;
    const NodePartials& partials_;
    std::vector<int64_t> next_;
};

/// A lost (token, expert) returns NaN instead of a weight.
void mark_lost_weights(const EndpointConfig& config, const DispatchRecord& record, int64_t token,
                       float* weights) {
    const Routing& routing = record.routing;
    const int32_t* const ids = routing.topk_idx.data() + token * routing.num_topk;
    const auto at = static_cast<size_t>(token);
    for (int32_t column = 0; column < routing.num_topk; ++column) {
        if (ids[column] < 0) {
            continue;
        }
        int64_t slot = routing.expert_slots[at * routing.num_topk + static_cast<size_t>(column)];
        if (record.recv_layout == RecvLayout::kToken) {
            const int32_t owner = ids[column] / config.num_local_experts();
            const auto found =
                std::find_if(routing.destinations.begin() + routing.first_destination[at],
                             routing.destinations.begin() + routing.first_destination[at + 1],
                             [&](const Destination& to) { return to.rank == owner; });
            slot = found->slot;
        }
        if (slot >= record.capacity) {
            weights[column] = std::numeric_limits<float>::quiet_NaN();
        }
    }
}

}  // namespace

void sum_tokens(Endpoint& endpoint, const SumInputs& inputs, const CombineTarget& target,
                TokenRange range) {
    const auto& [record, format, source, partials] = inputs;
    const Routing& routing = record.routing;
    const bool stream = routing.num_tokens * format.row_bytes >= kStreamBytes;
    const int64_t count = range.end - range.begin;
    endpoint.pool().parallel_for(count, kGrainRows, [&](int64_t first, int64_t last) {
        TokenSummer summer(endpoint.config(), record, source, partials, range.begin + first);
        for (int64_t token = range.begin + first; token < range.begin + last; ++token) {
            float* weights = nullptr;
            if (target.topk_weights != nullptr) {
                weights = target.topk_weights + token * routing.num_topk;
                std::fill_n(weights, routing.num_topk, 0.0F);
            }
            const SumRows sum = summer.collect(token, weights);
            std::byte* const out = target.out + token * format.row_bytes;
            if (is_lost(record, token)) {
                fill_nan(format, out);
                if (weights != nullptr) {
                    mark_lost_weights(endpoint.config(), record, token, weights);
                }
                continue;
            }
            ReduceArgs args = reduce_args(format, sum, out);
            args.bias = target.bias == nullptr ? nullptr : target.bias + token * target.bias_stride;
            args.stream = stream;
            endpoint.ops().reduce(args);
        }
        if (stream) {
            stream_fence();
        }
    });
}

void sum_node(Endpoint& endpoint, const Routing& routing, const RowFormat& format,
              const RowSource& source, TokenRange range, std::byte* records) {
    const layout::TokenRecord record =
        layout::TokenRecord::make(format.row_bytes, 0, routing.num_topk);
    const std::vector<int32_t>& tokens =
        routing.node_tokens[static_cast<size_t>(endpoint.config().node())];
    const int32_t num_local = endpoint.config().num_local_experts();
    endpoint.pool().parallel_for(
        range.end - range.begin, kGrainRows, [&](int64_t from, int64_t to) {
            for (int64_t index = from; index < to; ++index) {
                const auto token =
                    static_cast<size_t>(tokens[static_cast<size_t>(range.begin + index)]);
                std::byte* const out = records + index * record.stride;
                auto* const weights = reinterpret_cast<float*>(out + record.topk_weights_offset);
                std::fill_n(weights, routing.num_topk, 0.0F);
                SumRows sum;
                sum.open_group();
                for (int32_t at = routing.first_destination[token];
                     at < routing.first_destination[token + 1]; ++at) {
                    const Destination& place = routing.destinations[static_cast<size_t>(at)];
                    const std::byte* const row = source.row(place);
                    if (row == nullptr) {
                        continue;
                    }
                    sum.add(row);
                    const float* const carried = source.weights(place);
                    const int32_t* const ids = routing.topk_idx.data() + token * routing.num_topk;
                    for (int32_t column = 0; carried != nullptr && column < routing.num_topk;
                         ++column) {
                        if (ids[column] >= 0 && ids[column] / num_local == place.rank) {
                            weights[column] = carried[column];
                        }
                    }
                }
                endpoint.ops().reduce(reduce_args(format, sum, out));
            }
        });
}

void ReturnedRows::write(int64_t row, const ReturnedRow& target, bool stream) const {
    const int32_t num_topk = received.num_topk;
    if (recv_layout == RecvLayout::kToken) {
        if (target.row != nullptr) {
            (stream ? ops.copy_stream : ops.copy)(target.row, outputs.y + row * outputs.row_stride,
                                                  format.row_bytes);
        }
        if (target.weights != nullptr) {
            std::copy_n(outputs.topk_weights + row * num_topk, num_topk, target.weights);
        }
        return;
    }
    SumRows sum;
    float factors[kMaxRows];
    sum.open_group();
    if (target.weights != nullptr) {
        std::fill_n(target.weights, num_topk, 0.0F);
    }
    const auto at = static_cast<size_t>(row);
    for (int32_t index = received.first_expert_row[at]; index < received.first_expert_row[at + 1];
         ++index) {
        const ExpertRow& copy = received.expert_rows[static_cast<size_t>(index)];
        if (outputs.apply_weights != nullptr) {
            factors[sum.num_rows] = outputs.apply_weights[row * num_topk + copy.column];
        }
        sum.add(outputs.y + copy.position * outputs.row_stride);
        if (target.weights != nullptr) {
            target.weights[copy.column] = outputs.topk_weights[copy.position];
        }
    }
    if (target.row == nullptr) {
        return;
    }
    ReduceArgs args = reduce_args(format, sum, target.row);
    args.weights = outputs.apply_weights == nullptr ? nullptr : factors;
    args.stream = stream;
    ops.reduce(args);
}

}  // namespace deepcomm::cpu
