// SPDX-License-Identifier: Apache-2.0
// What one row leaves behind where it arrives: the row, its scales, ids, weights and slots. By one
// warp; a lane k < K holds pair k of the token.
#pragma once

#include "kernels/dispatch/send_shared.cuh"

namespace deepcomm::kernels {

/// A lane's pair of the token at hand.
struct PairSlots {
    int32_t expert = -1;
    int32_t dst = -1;
    int32_t token_slot = -1;
    int32_t pair_slot = -1;
    float weight = 0;
};

/// A row of a rank.
struct LandedRow {
    int32_t dst;
    int32_t slot;
};

template <typename T>
DEEPCOMM_DEVICE T* at(unsigned char* begin, int64_t offset) {
    return reinterpret_cast<T*>(begin + offset);
}

/// Copies one row's scales, row-major, by all lanes.
DEEPCOMM_DEVICE void copy_words(uint32_t* to, const uint32_t* from, int32_t num_words) {
    const device::Warp warp;
    if (num_words % 4 == 0) {
        const auto* vectors = reinterpret_cast<const device::Vec128*>(from);
        for (int32_t i = warp.thread_idx(); i < num_words / 4; i += warp.size()) {
            reinterpret_cast<device::Vec128*>(to)[i] = vectors[i];
        }
        return;
    }
    for (int32_t i = warp.thread_idx(); i < num_words; i += warp.size()) to[i] = from[i];
}

/// Where the scales of a row, or of a part of it, land.
template <typename Spec>
DEEPCOMM_DEVICE uint32_t* landed_scales(const SendBlock<Spec>& my, const LandedRow& row,
                                        int32_t first_word = 0) {
    const int64_t begin = static_cast<int64_t>(row.slot) * my.scale_bytes();
    return at<uint32_t>(my.smem.destinations[row.dst].scales, begin) + first_word;
}

/// The scales of the row in a stage.
template <typename Spec>
DEEPCOMM_DEVICE const uint32_t* staged_scales(const unsigned char* stage) {
    return reinterpret_cast<const uint32_t*>(stage + Spec::kScalesAt);
}

/// TOKEN: id and weight of a token's pair k as a rank sees them.
template <typename Spec>
DEEPCOMM_DEVICE void store_token_pair(const SendBlock<Spec>& my, const PairSlots& pair, int32_t k,
                                      const LandedRow& row) {
    const Destination& to = my.smem.destinations[row.dst];
    const bool is_theirs = pair.dst == row.dst;
    const int32_t id = is_theirs ? pair.expert - row.dst * my.num_local() : -1;
    const int64_t index = static_cast<int64_t>(row.slot) * my.params.num_topk + k;
    if (to.ids_are_64) {
        static_cast<int64_t*>(to.topk_idx)[index] = id;
    } else {
        static_cast<int32_t*>(to.topk_idx)[index] = id;
    }
    if (my.params.topk_weights != nullptr) {
        to.topk_weights[index] = is_theirs ? pair.weight : 0.0f;
    }
}

/// Expert layouts: the rows that dst will copy this one to, and their weights.
template <typename Spec>
DEEPCOMM_DEVICE void store_expert_pairs(const SendBlock<Spec>& my, const PairSlots& pair,
                                        int32_t dst, int32_t slot) {
    const int32_t k = my.warp.thread_idx();
    if (k >= my.params.num_topk) return;
    const Destination& to = my.smem.destinations[dst];
    const bool is_delivered = pair.dst == dst && pair.pair_slot < to.limit;
    const int64_t index = static_cast<int64_t>(slot) * my.params.num_topk + k;
    to.slots[index] = is_delivered ? pair.pair_slot : -1;
    if (my.params.topk_weights != nullptr) {
        to.topk_weights[index] = is_delivered ? pair.weight : 0.0f;
    }
}

/// Expert layouts: the copies here of what a stage holds. copy is a lane's slot, or -1; weight goes
/// with it.
template <typename Spec>
DEEPCOMM_DEVICE void store_copies(const SendBlock<Spec>& my, const RowPart& part, int32_t copy,
                                  float weight, const unsigned char* stage) {
    const ExpertTarget& target = my.params.target;
    const auto scales_of = [&](int32_t slot) {
        return target.scales + static_cast<int64_t>(slot) * my.params.scale_words + part.first_word;
    };
    if (copy >= 0) {
        device::bulk_store(target.rows + static_cast<int64_t>(copy) * Spec::kRowBytes + part.at,
                           stage, part.num_bytes);
        if (target.topk_weights != nullptr && part.is_first()) target.topk_weights[copy] = weight;
    }
    if (Spec::kWire == kWireBf16) return;
    if (part.has_bulk_scales()) {
        if (copy < 0) return;
        device::bulk_store(scales_of(copy), staged_scales<Spec>(stage), part.scale_bytes());
        return;
    }
    uint32_t copies = device::warp_ballot(copy >= 0);
    while (copies != 0) {
        const int32_t slot = device::warp_shuffle(copy, device::lowest_bit(copies));
        copies &= copies - 1;
        copy_words(scales_of(slot), staged_scales<Spec>(stage), part.num_words);
    }
}

}  // namespace deepcomm::kernels
