// SPDX-License-Identifier: Apache-2.0
// What the header of a dispatch says: how many tokens of this rank go to each expert, and which of them to each
// rank. All warps of a block but the last mark a bit for each id, by expert and token: one that is there is an
// expert that a token names twice. What everybody waits for takes few instructions so. PROTOCOLS.md:
// low_latency_dispatch.
#pragma once

#include "kernels/low_latency/dispatch_spec.cuh"

namespace deepcomm::kernels::low_latency {

constexpr int32_t kCountBarrier = 1;

/// Ids that a thread counts, to the last bit: all loads fly before the first is used.
struct CountedIds {
    static constexpr int32_t kCount = 5;  ///< at once: all of them at T = 128, K = 8

    IdRange range;
    IdBatch<kCount> low;
    IdBatch<kCount> high;  ///< words of the same ids, where they have 64 bits

    DEEPCOMM_DEVICE void load(const LowLatencyDispatchParams& params, const IdRange& next) {
        range = next;
        low.load(params, range);
        if (params.topk_idx_is_int64) high.load_high(params, range);
    }

    /// Words that differ from these of -1 are an expert, or wrong.
    DEEPCOMM_DEVICE int32_t high_word(const LowLatencyDispatchParams& params, int32_t i) const {
        return params.topk_idx_is_int64 ? high.ids[i] : low.ids[i] >> 31;
    }
};

DEEPCOMM_DEVICE int64_t id_at(const LowLatencyDispatchParams& params, int32_t index) {
    return params.topk_idx_is_int64 ? static_cast<const int64_t*>(params.topk_idx)[index]
                                    : static_cast<const int32_t*>(params.topk_idx)[index];
}

/// The last of a token's ids that are the same as one: of those, any may have been the first to be marked.
DEEPCOMM_DEVICE int32_t last_alike(const LowLatencyDispatchParams& params, int32_t index) {
    const int64_t id = id_at(params, index);
    int32_t last = index - index % params.base.num_topk + params.base.num_topk - 1;
    DEEPCOMM_NO_UNROLL
    while (id_at(params, last) != id) --last;
    return last;
}

/// Tells this rank's host of a thread's first wrong id, which raises InvalidArgument, and all ranks by the
/// header; a bit each for ids that are no experts, and for those that are repeated.
template <typename Shared>
DEEPCOMM_DEVICE void report_wrong(const LowLatencyDispatchParams& params, const CountedIds& ids,
                                  uint32_t strange, uint32_t repeated, Shared& shared) {
    if ((strange | repeated) == 0) return;
    const int32_t first = device::lowest_bit(strange | repeated);
    const bool is_twice = (repeated >> first & 1u) != 0;
    const auto kind = is_twice ? layout::RefusalKind::kIdTwice : layout::RefusalKind::kIdRange;
    device::atom_or_relaxed_block(&shared.refusal, refusal_flag(kind));
    if (!claim_status(params.base)) return;
    const int32_t index =
        is_twice ? last_alike(params, ids.range.index(first)) : ids.range.index(first);
    layout::LowLatencyStatus* status = params.base.status;
    status->kind = kind;
    status->operation = static_cast<int32_t>(Operation::kLowLatencyDispatch);
    status->culprit = params.base.comm.rank;
    status->token = index / params.base.num_topk;
    status->topk = index % params.base.num_topk;
    status->value = id_at(params, index);
    release_status(params.base);
}

/// Tokens whose ids are counted together: as many words of 32 as there is room for, for each expert.
struct CountedWords {
    int32_t begin;
    int32_t num;

    /// Of a word of tokens of an expert, among the marks.
    DEEPCOMM_DEVICE int32_t index(int32_t expert, int32_t word) const {
        return expert * num + word - begin;
    }
};

/// Marks a thread's ids: no atomic waits for the one before.
template <typename Shared>
DEEPCOMM_DEVICE void mark_ids(const LowLatencyDispatchParams& params, const CountedIds& ids,
                              const CountedWords& words, Shared& shared) {
    constexpr int32_t kCount = CountedIds::kCount;
    constexpr auto kTokenBits = static_cast<int32_t>(layout::kTokenBits);
    uint32_t bits[kCount], found[kCount];
    uint32_t strange = 0, repeated = 0;
    DEEPCOMM_UNROLL
    for (int32_t i = 0; i < kCount; ++i) {
        const int32_t low = ids.low.ids[i], high = ids.high_word(params, i);
        const int32_t expert = high == 0 ? expert_of(params, low) : -1;
        const int32_t token = ids.range.index(i) / params.base.num_topk;
        const int32_t word = words.index(expert, token / kTokenBits);
        bits[i] = expert >= 0 ? 1u << token % kTokenBits : 0;
        found[i] = device::atom_or_relaxed_block(&shared.marks[expert >= 0 ? word : 0], bits[i]);
        if (expert < 0 && (low & high) != -1) strange |= 1u << i;
    }
    DEEPCOMM_UNROLL
    for (int32_t i = 0; i < kCount; ++i) {
        if ((found[i] & bits[i]) != 0) repeated |= 1u << i;
    }
    report_wrong(params, ids, strange, repeated, shared);
}

template <typename Group>
DEEPCOMM_DEVICE void zero(const Group& group, uint32_t* words, int32_t num) {
    DEEPCOMM_NO_UNROLL
    for (int32_t i = group.thread_idx(); i < num; i += group.size()) words[i] = 0;
}

constexpr int32_t kMarksAtOnce = 4;

/// Adds up the marks: tokens of each expert, and which tokens go to each rank.
template <typename Shared>
DEEPCOMM_DEVICE void add_marks(const LowLatencyDispatchParams& params,
                               const device::WarpRange& counting, const CountedWords& words,
                               Shared& shared) {
    const layout::LowLatencyLayout& map = params.base.map;
    DEEPCOMM_NO_UNROLL
    for (int32_t expert = counting.thread_idx(); expert < params.num_experts;
         expert += counting.size()) {
        const uint32_t* marks = &shared.marks[expert * words.num];
        uint32_t count = 0;
        DEEPCOMM_NO_UNROLL
        for (int32_t begin = 0; begin < words.num; begin += kMarksAtOnce) {
            DEEPCOMM_UNROLL
            for (int32_t i = begin; i < begin + kMarksAtOnce; ++i) {
                count += i < words.num ? device::popcount(marks[i]) : 0;
            }
        }
        shared.counts[expert] += count;
    }
    const device::Warp warp;
    const int32_t num_local = map.num_local_experts;
    DEEPCOMM_NO_UNROLL
    for (int32_t rank = 0; rank < map.num_ranks; ++rank) {
        DEEPCOMM_NO_UNROLL
        for (int32_t i = warp.warp_idx(); i < words.num; i += counting.num_warps) {
            const uint32_t* marks = &shared.marks[rank * num_local * words.num + i];
            uint32_t bits = 0;
            DEEPCOMM_NO_UNROLL
            for (int32_t begin = 0; begin < num_local; begin += kMarksAtOnce * warp.size()) {
                DEEPCOMM_UNROLL
                for (int32_t j = 0; j < kMarksAtOnce; ++j) {
                    const int32_t local = begin + j * warp.size() + warp.thread_idx();
                    bits |= local < num_local ? marks[local * words.num] : 0;
                }
            }
            bits = device::warp_or(bits);
            // The last of several turns may have words behind the last one.
            if (warp.is_leader() && words.begin + i < map.token_words) {
                shared.token_bits[rank * map.token_words + words.begin + i] = bits;
            }
        }
    }
}

/// Counts this rank's tokens by expert and marks them by destination. Called by all warps but the last; the block
/// meets before the counts are read.
template <typename Shared>
DEEPCOMM_DEVICE void count_tokens(const LowLatencyDispatchParams& params, Shared& shared) {
    constexpr auto kTokenBits = static_cast<int32_t>(layout::kTokenBits);
    const device::WarpRange counting = {0, Shared::Spec::kNumCounting, kCountBarrier};
    const layout::LowLatencyLayout& map = params.base.map;
    const int32_t num_topk = params.base.num_topk, num_tokens = params.base.num_tokens;
    const int32_t num_words = (num_tokens + kTokenBits - 1) / kTokenBits;
    CountedWords words = {0, num_words};
    if (num_words * params.num_experts > Shared::kMarks) {
        words.num = Shared::kMarks / params.num_experts;
    }
    CountedIds ids;
    const auto load = [&](int32_t first) {
        const int32_t end = (words.begin + words.num) * kTokenBits;
        ids.load(params, {first + counting.thread_idx(), counting.size(),
                          (end < num_tokens ? end : num_tokens) * num_topk});
    };
    load(0);
    zero(counting, shared.counts, params.num_experts);
    zero(counting, shared.token_bits, map.num_ranks * map.token_words);
    if (counting.is_leader()) shared.refusal = 0;
    DEEPCOMM_NO_UNROLL
    for (; words.begin < num_words; words.begin += words.num) {
        zero(counting, shared.marks, words.num * params.num_experts);
        counting.sync();  // ORDER: the zeros before the marks
        int32_t first = words.begin * kTokenBits * num_topk;
        DEEPCOMM_NO_UNROLL
        do {
            if (first > 0) load(first);
            mark_ids(params, ids, words, shared);
            first += CountedIds::kCount * counting.size();
        } while (first < ids.range.num);
        counting.sync();  // ORDER: the marks before they are added up
        add_marks(params, counting, words, shared);
        counting.sync();  // ORDER: the sums before the marks are zeroed for others
    }
}

}  // namespace deepcomm::kernels::low_latency
