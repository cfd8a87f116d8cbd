// SPDX-License-Identifier: Apache-2.0
// The (token, k) pairs of a dispatch, a lane a pair; and role pair (TOKEN): ids and weights, by warps
// that move no rows. PROTOCOLS.md: dispatch_send.
#pragma once

#include "kernels/dispatch/deliver.cuh"

namespace deepcomm::kernels {

/// A lane's pair of a token, but for what follows from it: see name_rank.
template <bool kHasWeights, typename Spec>
DEEPCOMM_DEVICE PairSlots load_pair(const SendBlock<Spec>& my, int32_t token, int32_t k) {
    PairSlots pair;
    if (token >= my.num_tokens || k >= my.params.num_topk) return pair;
    const int64_t index = static_cast<int64_t>(token) * my.params.num_topk + k;
    pair.expert = my.params.table.topk_idx[index];
    pair.token_slot = my.params.table.token_slot[index];
    if (Spec::kByExpert) pair.pair_slot = my.params.table.pair_slot[index];
    if (my.params.topk_weights != nullptr && kHasWeights) {
        pair.weight = my.params.topk_weights[index];
    }
    return pair;
}

/// Who the pair goes to.
template <typename Spec>
DEEPCOMM_DEVICE void name_rank(const SendBlock<Spec>& my, PairSlots* pair) {
    if (pair->expert >= 0) pair->dst = pair->expert / my.num_local();
}

/// What was given as a pair's weight goes to the handle.
template <typename Spec>
DEEPCOMM_DEVICE void keep_weight(const SendBlock<Spec>& my, int32_t token, int32_t k,
                                 const PairSlots& pair) {
    if (token >= my.num_tokens || k >= my.params.num_topk) return;
    if (my.params.topk_weights == nullptr) return;
    my.params.table.topk_weights[static_cast<int64_t>(token) * my.params.num_topk + k] =
        pair.weight;
}

template <typename Spec>
DEEPCOMM_DEVICE const uint32_t* source_scales(const SendBlock<Spec>& my, int32_t token) {
    const RowSource& source = my.params.source;
    return reinterpret_cast<const uint32_t*>(source.scales + token * source.scale_stride);
}

/// Whether a lane's pair stands for a row that goes to its rank: to any (TOKEN), or to a peer.
template <typename Spec>
DEEPCOMM_DEVICE bool sends_row(const SendBlock<Spec>& my, const PairSlots& pair) {
    if (pair.token_slot < 0) return false;
    if (Spec::kByExpert) return pair.dst != my.rank();
    return pair.token_slot < my.smem.destinations[pair.dst].limit;
}

/// TOKEN: the scales of the lanes' tokens, where bulk copies cannot move them.
template <typename Spec>
DEEPCOMM_DEVICE void copy_scales(const SendBlock<Spec>& my, int32_t token, const PairSlots& pair) {
    if (Spec::kWire != kWireFp8 || my.has_bulk_scales()) return;
    uint32_t senders = device::warp_ballot(sends_row(my, pair));
    for (; senders != 0; senders &= senders - 1) {
        const int32_t lane = device::lowest_bit(senders);
        const int32_t dst = device::warp_shuffle(pair.dst, lane);
        const int32_t slot = device::warp_shuffle(pair.token_slot, lane);
        copy_words(landed_scales(my, {dst, slot}),
                   source_scales(my, device::warp_shuffle(token, lane)), my.params.scale_words);
    }
}

/// TOKEN: ids and weights of the lanes' pairs, of several tokens; rank after rank.
template <typename Spec>
DEEPCOMM_DEVICE void store_pairs(const SendBlock<Spec>& my, const PairSlots& pair, int32_t k,
                                 uint32_t own_token) {
    uint32_t left = device::warp_ballot(sends_row(my, pair));
    while (left != 0) {
        const int32_t dst = device::warp_shuffle(pair.dst, device::lowest_bit(left));
        const uint32_t alike = device::warp_ballot(sends_row(my, pair) && pair.dst == dst);
        left &= ~alike;
        const uint32_t sender = alike & own_token;
        const int32_t lane = sender != 0 ? device::lowest_bit(sender) : my.warp.thread_idx();
        const int32_t slot = device::warp_shuffle(pair.token_slot, lane);
        if (sender != 0) store_token_pair(my, pair, k, {dst, slot});
    }
}

/// TOKEN, role pair: ids and weights, by warps that move no rows. A lane a pair of one of several
/// tokens.
template <typename Spec>
DEEPCOMM_DEVICE void send_pairs(const SendBlock<Spec>& my) {
    const int32_t pairer =
        my.block.block_idx() * Spec::kPairers + my.warp.warp_idx() - Spec::kMovers;
    WorkQueue<2> queue(my.params.meet.taken + 1, pairer, my.block.num_blocks() * Spec::kPairers);
    const int32_t num_topk = my.params.num_topk, lane = my.warp.thread_idx();
    const int32_t num_at_once = device::kWarpSize / num_topk;
    const bool is_active = lane < num_at_once * num_topk;
    const int32_t own = is_active ? lane / num_topk : 0;
    const int32_t k = is_active ? lane % num_topk : num_topk;
    const uint32_t own_token =
        is_active ? (~0u >> (device::kWarpSize - num_topk)) << (own * num_topk) : 0;
    PairSlots next = load_pair<true>(my, queue.at(0) * num_at_once + own, k);
    for (int32_t n = 0; queue.at(n) * num_at_once < my.num_tokens; ++n) {
        const int32_t token = queue.at(n) * num_at_once + own;
        PairSlots pair = next;
        next = load_pair<true>(my, queue.at(n + 1) * num_at_once + own, k);
        name_rank(my, &pair);
        keep_weight(my, token, k, pair);
        store_pairs(my, pair, k, own_token);
        copy_scales(my, token, pair);
    }
}

}  // namespace deepcomm::kernels
