// SPDX-License-Identifier: Apache-2.0
// Role reduce: each token of this rank is summed over its ranks as soon as their rows are here; the
// own rank's rows are read where they are. PROTOCOLS.md: combine.
#pragma once

#include "kernels/combine/tokens.cuh"

namespace deepcomm::kernels {

/// A lane's pair of the token at hand.
struct ReducePair {
    Term term;
    int32_t dst;
    int32_t block;     ///< of the rows that dst sends back: layout/plan.hpp
    int32_t row_back;  ///< row of the combine region that holds what dst sent for the token, or -1
    int32_t slot;      ///< row here where this rank owns the expert, or -1
    bool is_first;     ///< of its token for its rank
    bool is_lost;
};

/// Place of this rank's own row, among all of a node or, between nodes, among those of its tokens.
template <typename Spec>
DEEPCOMM_DEVICE int32_t own_index(const CombineBlock<Spec>& my, int32_t slot) {
    return Spec::kStage == kStageBetweenNodes ? slot - my.rows_from(my.rank()) : slot;
}

/// This rank's own row, or, between nodes, what its node has summed of the token.
template <typename Spec>
DEEPCOMM_DEVICE const unsigned char* own_row(const CombineBlock<Spec>& my, int32_t slot) {
    if (Spec::kStage != kStageBetweenNodes) return my.output_row(slot);
    const int64_t index = own_index(my, slot);
    return reinterpret_cast<const unsigned char*>(my.params.outputs.own_sums +
                                                  index * Spec::kHidden);
}

/// What the routing table says of a lane's pair.
struct RoutedPair {
    int32_t expert = -1;
    int32_t token_slot = -1;
};

template <typename Spec>
DEEPCOMM_DEVICE RoutedPair load_routing(const CombineBlock<Spec>& my, int32_t token) {
    const int32_t k = my.warp.thread_idx();
    if (k >= my.params.num_topk || token >= my.num_tokens()) return {};
    const int64_t index = static_cast<int64_t>(token) * my.params.num_topk + k;
    return {my.params.table.topk_idx[index], my.params.table.token_slot[index]};
}

template <typename Spec>
DEEPCOMM_DEVICE ReducePair find_pair(const CombineBlock<Spec>& my, int32_t token,
                                     const RoutedPair& routed) {
    ReducePair pair = {{nullptr, -1, 1.0f}, -1, -1, -1, -1, false, false};
    const int32_t expert = routed.expert, token_slot = routed.token_slot;
    if (expert < 0) return pair;
    const int64_t index = static_cast<int64_t>(token) * my.params.num_topk + my.warp.thread_idx();
    pair.dst = expert / (my.params.meet.layout.shape.num_experts / Spec::kNumRanks);
    pair.block = my.row_origin(token) * Spec::kNumRanks + pair.dst;
    const int32_t pair_slot = Spec::kByExpert ? my.params.table.pair_slot[index] : token_slot;
    pair.is_first = token_slot >= 0;
    pair.is_lost = pair_slot >= my.capacity(pair.dst);
    if (pair.dst == my.rank()) {
        if (pair_slot < 0 || pair.is_lost) return pair;
        pair.slot = pair_slot;
        pair.term.key = expert;
        pair.term.row = own_row(my, pair_slot);
        if (my.params.topk_weights != nullptr) pair.term.weight = my.params.topk_weights[index];
    } else if (token_slot >= 0 && (Spec::kByExpert || !pair.is_lost)) {
        pair.row_back = token_slot - my.sent_base(pair.block) + my.combine_base(pair.block);
        pair.term.key = expert;
        pair.term.row = my.combine_row(pair.row_back);
    }
    return pair;
}

template <typename Spec>
DEEPCOMM_DEVICE ReducePair load_pair(const CombineBlock<Spec>& my, int32_t token) {
    return find_pair(my, token, load_routing(my, token));
}

/// Until every rank's row of the token is here; a lane a rank.
template <typename Spec>
DEEPCOMM_DEVICE bool await_rows(const CombineBlock<Spec>& my, const ReducePair& pair) {
    bool is_there = true;
    if (pair.row_back >= 0) {
        const int32_t row = pair.row_back - my.combine_base(pair.block);
        const int32_t chunk = row / layout::kPushChunk;
        const uint32_t* word = my.pushed_word(my.rank(), pair.block, chunk);
        const device::WaitSite site = {device::Operation::kCombine, device::Role::kReduce, pair.dst,
                                       row};
        is_there = device::wait_until(wait_context(my.params.meet.comm), site, my.epoch, word,
                                      [&]() -> device::Observed {
                                          // ORDER: pairs with the release of announce
                                          const uint32_t value = device::ld_acquire_sys(word);
                                          return {value, value == my.epoch};
                                      });
    }
    return my.warp.sync_and(is_there);  // ORDER: the lanes' acquires before all lanes' reads
}

/// Where the weights of a token go, as its sum does.
template <typename Spec>
DEEPCOMM_DEVICE float* weights_target(const CombineBlock<Spec>& my, int32_t token) {
    const TokenPlace place = place_of(my, token);
    if (Spec::kStage == kStageInNode && place.origin != my.own_origin()) {
        return my.rail_weights(place.origin, place.row);
    }
    return my.params.target.topk_weights + static_cast<int64_t>(place.row) * my.params.num_topk;
}

/// What the ranks of the token's experts gave in the pairs' places.
template <typename Spec>
DEEPCOMM_DEVICE void bring_weights(const CombineBlock<Spec>& my, const ReducePair& pair,
                                   int32_t token) {
    if (my.params.target.topk_weights == nullptr) return;
    // The first pair of a rank knows the row that all its pairs share.
    const int32_t k = my.warp.thread_idx();
    const uint32_t firsts =
        device::warp_ballot(pair.is_first) & device::warp_match(static_cast<uint32_t>(pair.dst));
    const int32_t first = firsts == 0 ? k : device::lowest_bit(firsts);
    const int32_t row_back = device::warp_shuffle(pair.row_back, first);
    const int32_t token_row = device::warp_shuffle(pair.slot, first);
    const bool has_lost_row = device::warp_shuffle(static_cast<int32_t>(pair.is_lost), first) != 0;
    if (k >= my.params.num_topk) return;
    const float* carried = my.params.outputs.carried;
    const int32_t num_topk = my.params.num_topk;
    float value = 0;
    if (Spec::kByExpert ? pair.is_lost : pair.dst >= 0 && has_lost_row) {
        value = device::float_from_bits(kNanBits);
    } else if (pair.dst == my.rank()) {
        const int64_t row = Spec::kByExpert ? pair.slot : own_index(my, token_row);
        value = Spec::kByExpert ? carried[row] : carried[row * num_topk + k];
    } else if (pair.dst >= 0) {
        value = my.combine_weights(row_back)[k];
    }
    weights_target(my, token)[k] = value;
}

/// Where the sum goes: to the token, or on to its rank on its own node, unrounded if that is here.
template <typename Spec>
DEEPCOMM_DEVICE SumTarget sum_target(const CombineBlock<Spec>& my, int32_t token, bool is_lost) {
    const CombineTarget& target = my.params.target;
    if constexpr (Spec::kStage == kStageInNode) {
        const TokenPlace place = place_of(my, token);
        if (place.origin != my.own_origin()) {
            return {my.rail_row(place.origin, place.row), nullptr, nullptr, is_lost};
        }
        float* sums = target.own_sums + static_cast<int64_t>(place.row) * Spec::kHidden;
        return {nullptr, sums, nullptr, is_lost};
    }
    SumTarget sum = {target.out + static_cast<int64_t>(token) * Spec::kRowBytes, nullptr, nullptr,
                     is_lost};
    if (target.bias != nullptr) sum.bias = target.bias + token * target.bias_stride;
    return sum;
}

/// Inside a node: the rank of a token's origin hears of a chunk of sums once the last one is complete.
template <typename Spec>
DEEPCOMM_DEVICE void announce_sum(const CombineBlock<Spec>& my, int32_t token) {
    if constexpr (Spec::kStage == kStageInNode) {
        const TokenPlace place = place_of(my, token);
        if (!place.ends_piece || place.origin == my.own_origin()) return;
        announce(my, my.rail_word(place.origin, place.row / layout::kPushChunk));
    }
}

/// TOKEN.
template <typename Spec>
DEEPCOMM_DEVICE bool reduce_token(const CombineBlock<Spec>& my, int32_t token, ReducePair pair) {
    const TermOrder order = order_terms(pair.term.key);
    const bool is_lost = device::warp_ballot(pair.is_lost) != 0;
    if (!await_rows(my, pair)) return false;
    bring_weights(my, pair, token);
    pair.term.is_sum = Spec::kStage == kStageBetweenNodes && pair.slot >= 0;
    constexpr SumKind kKind = Spec::kStage == kStageBetweenNodes ? kSumNodes : kSumRanks;
    sum_terms<Spec::kHidden, kKind>(pair.term, order, sum_target(my, token, is_lost));
    return true;
}

/// TOKEN: this warp's tokens; the next one's routing is loaded meanwhile. False when a rank did not
/// come.
template <typename Spec>
DEEPCOMM_DEVICE bool reduce_tokens(const CombineBlock<Spec>& my) {
    const WorkQueue<1> queue = pieces_to_reduce(my);
    TokenStream<Spec> tokens(my, queue);
    int32_t token = tokens.first(queue.worker);
    RoutedPair routed = load_routing(my, token);
    while (token < my.num_tokens()) {
        const int32_t following = tokens.after(token);
        const ReducePair pair = find_pair(my, token, routed);
        routed = load_routing(my, following);
        if (!reduce_token(my, token, pair)) return false;
        announce_sum(my, token);
        token = following;
    }
    return true;
}

}  // namespace deepcomm::kernels
