// SPDX-License-Identifier: Apache-2.0
#include "cpu/routing.hpp"

#include <algorithm>

#include "common/error.hpp"

namespace deepcomm::cpu {

namespace {

int32_t checked_id(const EndpointConfig& config, int64_t id, int32_t token, int32_t column) {
    DEEPCOMM_CHECK_ARG(id >= -1 && id < config.num_experts,
                       "topk_idx: expected ids in 0..%d or -1, got %lld at [%d, %d]",
                       config.num_experts - 1, static_cast<long long>(id), token, column);
    return static_cast<int32_t>(id);
}

void check_distinct(const int32_t* ids, int32_t num_topk, int32_t token) {
    for (int32_t column = 1; column < num_topk; ++column) {
        for (int32_t earlier = 0; earlier < column; ++earlier) {
            DEEPCOMM_CHECK_ARG(ids[column] < 0 || ids[column] != ids[earlier],
                               "topk_idx: expected distinct experts in a row, got expert %d twice "
                               "in row %d (columns %d and %d)",
                               ids[column], token, earlier, column);
        }
    }
}

/// The distinct owners of a token's experts, ascending. Returns how many.
int32_t owners_of(const EndpointConfig& config, const int32_t* ids, int32_t num_topk,
                  int32_t* owners) {
    int32_t count = 0;
    for (int32_t column = 0; column < num_topk; ++column) {
        if (ids[column] >= 0) {
            owners[count++] = ids[column] / config.num_local_experts();
        }
    }
    std::sort(owners, owners + count);
    return static_cast<int32_t>(std::unique(owners, owners + count) - owners);
}

}  // namespace

RowCounts count_rows(const EndpointConfig& config, const void* topk_idx, bool is_int64,
                     Routing& routing) {
    RowCounts counts;
    counts.per_rank.assign(static_cast<size_t>(config.num_ranks), 0);
    counts.per_node.assign(static_cast<size_t>(config.num_nodes()), 0);
    counts.per_expert.assign(static_cast<size_t>(config.num_experts), 0);
    const int32_t num_topk = routing.num_topk;
    routing.topk_idx.resize(static_cast<size_t>(routing.num_tokens) * num_topk);
    int32_t owners[kMaxTopk];
    for (int32_t token = 0; token < routing.num_tokens; ++token) {
        int32_t* const ids = routing.topk_idx.data() + static_cast<int64_t>(token) * num_topk;
        for (int32_t column = 0; column < num_topk; ++column) {
            const int64_t at = static_cast<int64_t>(token) * num_topk + column;
            const int64_t id = is_int64 ? static_cast<const int64_t*>(topk_idx)[at]
                                        : static_cast<const int32_t*>(topk_idx)[at];
            ids[column] = checked_id(config, id, token, column);
            if (id >= 0) {
                ++counts.per_expert[static_cast<size_t>(id)];
            }
        }
        check_distinct(ids, num_topk, token);
        const int32_t count = owners_of(config, ids, num_topk, owners);
        int32_t last_node = -1;
        for (int32_t index = 0; index < count; ++index) {
            ++counts.per_rank[static_cast<size_t>(owners[index])];
            const int32_t node = config.node_of(owners[index]);
            counts.per_node[static_cast<size_t>(node)] += node != last_node;
            last_node = node;
        }
    }
    return counts;
}

int64_t CountTable::rows_at(int32_t destination) const {
    int64_t total = 0;
    for (const RowCounts& source : ranks) {
        total += source.per_rank[static_cast<size_t>(destination)];
    }
    return total;
}

std::vector<int32_t> expert_offsets(const EndpointConfig& config, const CountTable& table,
                                    int32_t rank, int32_t alignment) {
    const int32_t num_local = config.num_local_experts();
    std::vector<int32_t> offsets(static_cast<size_t>(num_local) + 1, 0);
    for (int32_t expert = 0; expert < num_local; ++expert) {
        int64_t count = 0;
        for (const RowCounts& source : table.ranks) {
            count += source.per_expert[static_cast<size_t>(rank * num_local + expert)];
        }
        const int64_t end = offsets[static_cast<size_t>(expert)] + round_up(count, alignment);
        DEEPCOMM_CHECK_ARG(end <= INT32_MAX,
                           "expert_alignment: expected fewer than 2^31 rows a "
                           "rank, got %lld with alignment %d",
                           static_cast<long long>(end), alignment);
        offsets[static_cast<size_t>(expert) + 1] = static_cast<int32_t>(end);
    }
    return offsets;
}

SlotAssigner::SlotAssigner(const EndpointConfig& config, const CountTable& table, int32_t source,
                           int32_t expert_alignment)
    : config_(config),
      next_row_(static_cast<size_t>(config.num_ranks), 0),
      next_expert_row_(static_cast<size_t>(config.num_experts), 0) {
    const int32_t num_local = config.num_local_experts();
    for (int32_t rank = 0; rank < config.num_ranks; ++rank) {
        const auto offsets = expert_offsets(config, table, rank, expert_alignment);
        std::copy_n(offsets.begin(), num_local, next_expert_row_.begin() + rank * num_local);
    }
    for (int32_t earlier = 0; earlier < source; ++earlier) {
        const RowCounts& counts = table.ranks[static_cast<size_t>(earlier)];
        for (size_t rank = 0; rank < next_row_.size(); ++rank) {
            next_row_[rank] += counts.per_rank[rank];
        }
        for (size_t expert = 0; expert < next_expert_row_.size(); ++expert) {
            next_expert_row_[expert] += counts.per_expert[expert];
        }
    }
}

void SlotAssigner::assign(Routing& routing, int32_t only_node) {
    if (routing.first_destination.empty()) {
        routing.first_destination.push_back(0);
        routing.node_tokens.resize(static_cast<size_t>(config_.num_nodes()));
    }
    routing.expert_slots.resize(routing.topk_idx.size(), -1);
    const auto assigned = static_cast<int32_t>(routing.first_destination.size()) - 1;
    for (int32_t token = assigned; token < routing.num_tokens; ++token) {
        assign_token(routing, token, only_node);
    }
}

void SlotAssigner::assign_token(Routing& routing, int32_t token, int32_t only_node) {
    const int32_t* const ids = routing.ids(token);
    int32_t owners[kMaxTopk];
    const int32_t count = owners_of(config_, ids, routing.num_topk, owners);
    int32_t last_node = -1;
    for (int32_t index = 0; index < count; ++index) {
        const int32_t rank = owners[index];
        const int32_t node = config_.node_of(rank);
        if (only_node >= 0 && node != only_node) {
            continue;
        }
        routing.destinations.push_back({rank, next_row_[static_cast<size_t>(rank)]++});
        if (node != last_node) {
            routing.node_tokens[static_cast<size_t>(node)].push_back(token);
            last_node = node;
        }
    }
    routing.first_destination.push_back(static_cast<int32_t>(routing.destinations.size()));
    for (int32_t column = 0; column < routing.num_topk; ++column) {
        if (ids[column] >= 0) {
            routing.expert_slots[static_cast<size_t>(token) * routing.num_topk + column] =
                next_expert_row_[static_cast<size_t>(ids[column])]++;
        }
    }
}

void assign_source_slots(const EndpointConfig& config, Routing& routing, int32_t only_node) {
    CountTable empty;
    SlotAssigner assigner(config, empty, 0, 1);
    assigner.assign(routing, only_node);
}

}  // namespace deepcomm::cpu
