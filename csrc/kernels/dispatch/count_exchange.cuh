// SPDX-License-Identifier: Apache-2.0
// Role count: counts between the blocks of a rank and between ranks, in words that carry the epoch
// of their operation, so that nothing is reset and nothing else has to be ordered.
#pragma once

#include "kernels/dispatch/count_shared.cuh"

namespace deepcomm::kernels {

/// Waits for count words of which each carries the epoch, and hands their values to visit. Looks at
/// all of them at once for as long as that may help, then waits for one after the other.
template <int32_t kMaxWords, typename Load, typename Await, typename Visit>
DEEPCOMM_DEVICE bool gather_words(int32_t count, uint32_t epoch, Load&& load, Await&& await,
                                  Visit&& visit) {
    uint64_t values[kMaxWords];
    bool is_complete = true;
    bool are_there = false;
    DEEPCOMM_NO_UNROLL
    for (int32_t attempt = 0; !are_there && is_complete; ++attempt) {
        if (attempt >= device::kOptimisticPolls) {
            DEEPCOMM_NO_UNROLL
            for (int32_t i = 0; i < count && is_complete; ++i) is_complete = await(i);
        }
        are_there = true;
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kMaxWords; ++i) {
            if (i < count) values[i] = load(i);
        }
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kMaxWords; ++i) {
            if (i < count && values[i] >> 32 != epoch) are_there = false;
        }
    }
    DEEPCOMM_UNROLL
    for (int32_t i = 0; i < kMaxWords; ++i) {
        if (i < count) visit(i, static_cast<uint32_t>(values[i]));
    }
    return is_complete;
}

/// One word of them.
template <typename Load>
DEEPCOMM_DEVICE bool await_tagged(const device::WaitContext& context, const device::WaitSite& site,
                                  const uint64_t* word, uint32_t epoch, uint64_t* value,
                                  Load&& load) {
    return device::wait_until(context, site, epoch, word, [&]() -> device::Observed {
        *value = load(word);
        return {*value >> 32, *value >> 32 == epoch};
    });
}

/// Adds up one counter over the blocks before this one. The last counter is the refusal's bits.
template <int32_t kNumRanks, int32_t kNumExperts, int32_t kNumOrigins>
DEEPCOMM_DEVICE bool add_blocks_before(const CountBlock<kNumRanks, kNumExperts, kNumOrigins>& my,
                                       int32_t counter, uint32_t* before) {
    const CommParams& comm = my.params.meet.comm;
    const auto load = [](const uint64_t* word) { return device::ld_relaxed_gpu(word); };
    bool is_complete = true;
    DEEPCOMM_NO_UNROLL
    for (int32_t first = 0; first < my.block.block_idx() && is_complete; first += kWordsAtOnce) {
        const int32_t left = my.block.block_idx() - first;
        is_complete = gather_words<kWordsAtOnce>(
            left < kWordsAtOnce ? left : kWordsAtOnce, my.epoch,
            [&](int32_t n) { return load(my.partial(first + n, counter)); },
            [&](int32_t n) {
                uint64_t value;
                return await_tagged(wait_context(comm), my.site(device::Role::kCount, comm.rank),
                                    my.partial(first + n, counter), my.epoch, &value, load);
            },
            [&](int32_t, uint32_t value) {
                *before = counter == my.kNumCounters ? *before | value : *before + value;
            });
    }
    return is_complete;
}

/// Publishes the block's sums to the blocks after it and learns those of the blocks before it.
template <int32_t kNumRanks, int32_t kNumExperts, int32_t kNumOrigins>
DEEPCOMM_DEVICE bool exchange_partials(const CountBlock<kNumRanks, kNumExperts, kNumOrigins>& my) {
    bool is_complete = true;
    DEEPCOMM_NO_UNROLL
    for (int32_t i = my.block.thread_idx(); i < my.kNumPartials; i += my.block.size()) {
        const bool is_refusal = i == my.kNumCounters;
        uint32_t own = is_refusal ? device::ld_relaxed_block(&my.smem.refusal) : 0;
        DEEPCOMM_NO_UNROLL
        for (int32_t w = 0; w < kWalkWarps && !is_refusal; ++w) own += my.smem.counters[w][i];
        device::st_relaxed_gpu(my.partial(my.block.block_idx(), i), my.tagged(own));
        uint32_t before = 0;
        is_complete = add_blocks_before(my, i, &before) && is_complete;
        if (is_refusal) {
            device::st_relaxed_block(&my.smem.refusal, before | own);
        } else {
            my.smem.before[i] = before;
            my.smem.own[i] = before + own;
        }
    }
    return my.block.sync_and(is_complete);  // ORDER: the sums before their publication
}

/// By the last block, which knows the rank's sums: header and counts go to all ranks.
template <int32_t kNumRanks, int32_t kNumExperts, int32_t kNumOrigins>
DEEPCOMM_DEVICE void publish_counts(const CountBlock<kNumRanks, kNumExperts, kNumOrigins>& my) {
    const CommParams& comm = my.params.meet.comm;
    if (my.block.is_leader()) {
        device::st_relaxed_gpu(my.params.overflow, 0);
        device::atom_or_relaxed_block(&my.smem.refusal, earlier_refusal(my.params.meet));
    }
    if (kNumOrigins > 1) {
        DEEPCOMM_NO_UNROLL
        for (int32_t o = my.block.thread_idx(); o < kNumOrigins; o += my.block.size()) {
            device::st_relaxed_gpu(my.params.lost + o, 0);
        }
    }
    my.block.sync();  // ORDER: all of it before the header; who sets a flag has seen that
    publish_header(my.params.meet, my.block, my.epoch,
                   {device::ld_relaxed_block(&my.smem.refusal), my.num_tokens()});
    DEEPCOMM_NO_UNROLL
    for (int32_t peer = 0; peer < kNumRanks; ++peer) {
        auto* words = reinterpret_cast<uint64_t*>(
            comm.bases[peer] + my.params.meet.layout.counts_of(my.epoch, comm.rank));
        DEEPCOMM_NO_UNROLL
        for (int32_t i = my.block.thread_idx(); i < my.kNumCounters; i += my.block.size()) {
            device::st_relaxed_sys(words + i, my.tagged(my.smem.own[i]));
        }
    }
}

/// The count words that a rank has sent here.
template <int32_t kNumRanks, int32_t kNumExperts, int32_t kNumOrigins>
DEEPCOMM_DEVICE const uint64_t* count_words(
    const CountBlock<kNumRanks, kNumExperts, kNumOrigins>& my, int32_t src) {
    const CommParams& comm = my.params.meet.comm;
    return reinterpret_cast<const uint64_t*>(comm.bases[comm.rank] +
                                             my.params.meet.layout.counts_of(my.epoch, src));
}

/// Adds up the counts of all ranks and origins: totals, and what comes before this block's own. Rows
/// are in the order of their origins, then of the ranks that send them on.
template <int32_t kNumRanks, int32_t kNumExperts, int32_t kNumOrigins>
DEEPCOMM_DEVICE bool gather_counts(const CountBlock<kNumRanks, kNumExperts, kNumOrigins>& my) {
    constexpr int32_t kSources = kNumOrigins * kNumRanks;
    constexpr int32_t kAtOnce = kSources < kWordsAtOnce ? kSources : kWordsAtOnce;
    const CommParams& comm = my.params.meet.comm;
    const auto load = [](const uint64_t* word) { return device::ld_relaxed_sys(word); };
    bool is_complete = true;
    DEEPCOMM_NO_UNROLL
    for (int32_t i = my.block.thread_idx(); i < my.kNumTotals; i += my.block.size()) {
        const auto word = [&](int32_t source) {
            return count_words(my, source % kNumRanks) + my.counter(source / kNumRanks, i);
        };
        uint32_t total = 0;
        DEEPCOMM_NO_UNROLL
        for (int32_t first = 0; first < kSources && is_complete; first += kAtOnce) {
            const int32_t count = kSources - first < kAtOnce ? kSources - first : kAtOnce;
            is_complete = gather_words<kAtOnce>(
                count, my.epoch, [&](int32_t n) { return load(word(first + n)); },
                [&](int32_t n) {
                    uint64_t value;
                    return await_tagged(wait_context(comm),
                                        my.site(device::Role::kCount, (first + n) % kNumRanks),
                                        word(first + n), my.epoch, &value, load);
                },
                [&](int32_t n, uint32_t value) {
                    const bool is_first_there = i < kNumRanks && my.is_mirror(i);
                    if ((first + n) % kNumRanks == comm.rank && !is_first_there) {
                        my.smem.before[my.counter((first + n) / kNumRanks, i)] += total;
                    }
                    total += value;
                    if (i < kNumRanks) my.smem.tokens[(first + n) * kNumRanks + i] = value;
                });
        }
        my.smem.totals[i] = total;
    }
    return my.block.sync_and(is_complete);  // ORDER: the sums before the offsets made of them
}

}  // namespace deepcomm::kernels
