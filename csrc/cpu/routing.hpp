// SPDX-License-Identifier: Apache-2.0
// Where every row goes: counts from the ids, slots from the counts of all ranks. Pure functions of
// the routing, the same on every rank; no memory is shared here.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/endpoint.hpp"

namespace deepcomm::cpu {

/// A token's place on one rank.
struct Destination {
    int32_t rank;
    int32_t slot;  ///< row in TOKEN order there
};

/// What one rank sends: its ids, and once the counts of all ranks are known, the slots.
struct Routing {
    int32_t num_tokens = 0;
    int32_t num_topk = 0;
    std::vector<int32_t> topk_idx;                  ///< [T, K], -1 = none
    std::vector<int32_t> first_destination;         ///< [T + 1], index into destinations
    std::vector<Destination> destinations;          ///< per token, ranks ascending
    std::vector<int32_t> expert_slots;              ///< [T, K] rows in EXPERT order, or empty
    std::vector<std::vector<int32_t>> node_tokens;  ///< per node: tokens with a destination there

    const int32_t* ids(int64_t token) const { return topk_idx.data() + token * num_topk; }
};

/// Calls visit(token, destination) for every destination of routing on the node of config's rank.
template <typename Visit>
void for_each_local(const EndpointConfig& config, const Routing& routing, Visit&& visit) {
    for (int64_t token = 0; token < routing.num_tokens; ++token) {
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

/// Numbers of rows one rank sends, in the order they are announced.
struct RowCounts {
    std::vector<int32_t> per_rank;    ///< [R] tokens
    std::vector<int32_t> per_node;    ///< [N] tokens
    std::vector<int32_t> per_expert;  ///< [E] (token, expert) pairs
};

/// Reads ids [T, K] (int32 or int64, contiguous) into routing and counts them. Throws InvalidArgument
/// naming the first id that is out of range or repeated in its row.
RowCounts count_rows(const EndpointConfig& config, const void* topk_idx, bool is_int64,
                     Routing& routing);

/// Counts of all ranks, as announced.
struct CountTable {
    std::vector<RowCounts> ranks;

    int32_t rows_from(int32_t source, int32_t destination) const {
        return ranks[static_cast<size_t>(source)].per_rank[static_cast<size_t>(destination)];
    }
    int64_t rows_at(int32_t destination) const;
};

/// First row of each local expert of rank in EXPERT order, [L + 1].
std::vector<int32_t> expert_offsets(const EndpointConfig& config, const CountTable& table,
                                    int32_t rank, int32_t alignment);

/// Hands out the slots of one source's tokens, in token order, on all ranks or those of one node.
class SlotAssigner {
  public:
    SlotAssigner(const EndpointConfig& config, const CountTable& table, int32_t source,
                 int32_t expert_alignment);

    /// Appends the destinations (and EXPERT slots) of the tokens of routing.topk_idx not yet
    /// assigned; only those on only_node where it is not negative.
    void assign(Routing& routing, int32_t only_node = -1);

  private:
    void assign_token(Routing& routing, int32_t token, int32_t only_node);

    const EndpointConfig& config_;
    std::vector<int32_t> next_row_;         ///< [R]
    std::vector<int32_t> next_expert_row_;  ///< [E]
};

/// The same without counts: rows numbered from 0 at each rank (low latency).
void assign_source_slots(const EndpointConfig& config, Routing& routing, int32_t only_node = -1);

}  // namespace deepcomm::cpu
