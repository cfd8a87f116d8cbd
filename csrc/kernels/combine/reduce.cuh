// SPDX-License-Identifier: Apache-2.0
// Role reduce: each token of this rank is summed over its ranks as soon as their rows are here; the
// own rank's rows are read where they are. PROTOCOLS.md: combine.
#pragma once

#include "kernels/combine/shared.cuh"

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

/// This rank's own row, or, between nodes, what its node has summed of the token.
template <typename Spec>
DEEPCOMM_DEVICE const unsigned char* own_row(const CombineBlock<Spec>& my, int32_t slot) {
    if (Spec::kStage != kStageBetweenNodes) return my.output_row(slot);
    const int64_t index = slot - my.rows_from(my.rank());
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
                                          // ORDER: pairs with the release of announce_pushed
                                          const uint32_t value = device::ld_acquire_sys(word);
                                          return {value, value == my.epoch};
                                      });
    }
    return my.warp.sync_and(is_there);  // ORDER: the lanes' acquires before all lanes' reads
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
        value = Spec::kByExpert ? carried[pair.slot]
                                : carried[static_cast<int64_t>(token_row) * num_topk + k];
    } else if (pair.dst >= 0) {
        value = my.combine_weights(row_back)[k];
    }
    my.params.target.topk_weights[static_cast<int64_t>(token) * num_topk + k] = value;
}

/// Where the sum goes: to the token, or to its rank on its own node, unrounded if that is here.
template <typename Spec>
DEEPCOMM_DEVICE SumTarget sum_target(const CombineBlock<Spec>& my, int32_t token, bool is_lost) {
    const CombineTarget& target = my.params.target;
    SumTarget sum = {target.out + static_cast<int64_t>(token) * Spec::kRowBytes, nullptr, nullptr,
                     is_lost};
    if (target.bias != nullptr) sum.bias = target.bias + token * target.bias_stride;
    if (Spec::kStage != kStageInNode) return sum;
    const int32_t own_token = token - my.tokens_from(my.params.own_origin);
    if (own_token >= 0 && token < my.tokens_from(my.params.own_origin + 1)) {
        sum.floats = target.own_sums + static_cast<int64_t>(own_token) * Spec::kHidden;
    }
    return sum;
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

/// The tokens in the order in which they are reduced.
template <typename Spec>
DEEPCOMM_DEVICE WorkQueue<1> tokens_to_reduce(const CombineBlock<Spec>& my) {
    uint32_t* word = my.params.meet.taken + 1;
    const int32_t num_blocks = my.block.num_blocks(), w = my.warp.warp_idx();
    if (!my.are_roles_apart()) {
        const int32_t num_others = Spec::kByExpert ? 0 : Spec::kPushWarps;
        const int32_t num_reducing = Spec::kWarps - num_others;
        return {word, my.block.block_idx() * num_reducing + w - num_others,
                num_blocks * num_reducing};
    }
    const int32_t num_reducing = num_blocks - my.num_pushing();
    const int32_t reducer = (my.block.block_idx() - my.num_pushing()) * Spec::kWarps + w;
    return {word, my.pushes() ? -1 : reducer, num_reducing * Spec::kWarps};
}

/// TOKEN: this warp's tokens; the next one's routing is loaded meanwhile. False when a rank did not
/// come.
template <typename Spec>
DEEPCOMM_DEVICE bool reduce_tokens(const CombineBlock<Spec>& my) {
    const WorkQueue<1> queue = tokens_to_reduce(my);
    WorkStream tokens(queue);
    int32_t token = queue.worker < 0 ? tokens.next() : queue.worker;
    RoutedPair routed = load_routing(my, token);
    while (token < my.num_tokens()) {
        const int32_t following = tokens.next();
        const ReducePair pair = find_pair(my, token, routed);
        routed = load_routing(my, following);
        if (!reduce_token(my, token, pair)) return false;
        token = following;
    }
    return true;
}

}  // namespace deepcomm::kernels
