// SPDX-License-Identifier: Apache-2.0
// The sum of a token's rows on one rank, by a block, in a fixed order: the part of a combine whose
// time is that of its loads.
#pragma once

#include "kernels/low_latency/combine_spec.cuh"
#include "kernels/rows/sum.cuh"

namespace deepcomm::kernels::low_latency {

/// The rows of a token's experts as one lane sees them: that of its entry.
struct ExpertRow {
    const unsigned char* row;  ///< or null
    float weight;
    int32_t column;
};

/// Sums vectors first, first + threads, ... of a token's rows in FP32, by ascending expert: kTerms
/// rows at a time, all of whose loads fly before the first is added. kIsOnce: there are no more.
template <typename Spec, int kMaxVectors, int kTerms, bool kIsOnce>
struct PartialSum {
    static constexpr int kAll = (Spec::kRowVectors + Spec::kNumThreads - 1) / Spec::kNumThreads;
    static constexpr int kCount = kAll < kMaxVectors ? kAll : kMaxVectors;

    Floats8 sums[kCount];

    static DEEPCOMM_DEVICE void load(const unsigned char* row, int32_t first,
                                     Vec128 (&vectors)[kCount]) {
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kCount; ++i) {
            const int32_t index = first + i * Spec::kNumThreads;
            if (index < Spec::kRowVectors) {
                vectors[i] =
                    device::ld_weak_streaming(reinterpret_cast<const Vec128*>(row) + index);
            }
        }
    }

    /// Rows begin, begin + 1, ... of count.
    DEEPCOMM_DEVICE void add_rows(const ExpertRow& mine, int32_t begin, int32_t count,
                                  bool has_weights, int32_t first) {
        Vec128 terms[kTerms][kCount] = {};
        const auto bits = reinterpret_cast<uint64_t>(mine.row);
        DEEPCOMM_UNROLL
        for (int32_t j = 0; j < kTerms; ++j) {
            if (begin + j >= count) break;
            const uint64_t row = device::warp_shuffle(bits, begin + j);
            load(reinterpret_cast<const unsigned char*>(row), first, terms[j]);
        }
        DEEPCOMM_UNROLL
        for (int32_t j = 0; j < kTerms; ++j) {
            if (begin + j >= count) break;
            const float weight = device::warp_shuffle(mine.weight, begin + j);
            DEEPCOMM_UNROLL
            for (int32_t i = 0; i < kCount; ++i) {
                Floats8 floats = floats_of(terms[j][i]);
                if (has_weights) scale_by(&floats, weight);
                add_to(&sums[i], floats);
            }
        }
    }

    template <typename Shared>
    DEEPCOMM_DEVICE void stage(int32_t first, Shared& shared) const {
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kCount; ++i) {
            const int32_t index = first + i * Spec::kNumThreads;
            if (index < Spec::kRowVectors) {
                reinterpret_cast<Vec128*>(shared.row)[index] = bf16_of(sums[i]);
            }
        }
    }

    /// Sums and stages the row.
    template <typename Shared>
    static DEEPCOMM_DEVICE void run(const ExpertRow& mine, int32_t count, bool has_weights,
                                    const device::Block& block, Shared& shared) {
        DEEPCOMM_NO_UNROLL
        for (int32_t i = 0; i < kAll; i += kCount) {
            const int32_t first = block.thread_idx() + i * Spec::kNumThreads;
            PartialSum sum = {};
            DEEPCOMM_NO_UNROLL
            for (int32_t begin = 0; begin < (kIsOnce ? kTerms : count); begin += kTerms) {
                sum.add_rows(mine, begin, count, has_weights, first);
            }
            sum.stage(first, shared);
        }
    }
};

/// The same for any number of rows: registers hold four whole rows, or halves of eight.
template <typename Shared>
DEEPCOMM_DEVICE void sum_rows(const ExpertRow& mine, int32_t count, bool has_weights,
                              const device::Block& block, Shared& shared) {
    using Spec = typename Shared::Spec;
    if (count <= 4) {
        PartialSum<Spec, 4, 4, true>::run(mine, count, has_weights, block, shared);
    } else {
        PartialSum<Spec, 2, 8, false>::run(mine, count, has_weights, block, shared);
    }
}

}  // namespace deepcomm::kernels::low_latency
