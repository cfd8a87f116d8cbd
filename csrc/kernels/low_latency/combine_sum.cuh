// SPDX-License-Identifier: Apache-2.0
// The sum of a token's rows on one rank, by a block, part by part, in a fixed order: what of a combine
// takes the time of its loads.
#pragma once

#include "kernels/low_latency/combine_spec.cuh"
#include "kernels/rows/sum.cuh"

namespace deepcomm::kernels::low_latency {

/// The part that a block sums of the rows of a token's experts, as one lane sees it: of its entry.
struct ExpertRow {
    const unsigned char* part;  ///< or null
    float weight;
    int32_t column;
};

/// What a block sums: a part of each of a token's rows here.
struct ExpertRows {
    ExpertRow mine;
    int32_t num;
    bool has_weights;
    int32_t num_vectors;  ///< of the part
};

/// Sums vectors first, first + threads, ... of a part in FP32, by ascending expert: kTerms rows at a
/// time, all of whose loads fly before the first is added.
template <typename Spec>
struct PartialSum {
    static constexpr int kTerms = 8;
    static constexpr int kAll = (Spec::kPartVectors + Spec::kNumThreads - 1) / Spec::kNumThreads;
    static constexpr int kCount = kAll < 2 ? kAll : 2;

    Floats8 sums[kCount];

    static DEEPCOMM_DEVICE void load(const unsigned char* part, int32_t num_vectors, int32_t first,
                                     Vec128 (&vectors)[kCount]) {
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kCount; ++i) {
            const int32_t index = first + i * Spec::kNumThreads;
            if (index < num_vectors) {
                vectors[i] =
                    device::ld_weak_streaming(reinterpret_cast<const Vec128*>(part) + index);
            }
        }
    }

    /// Rows begin, begin + 1, ...
    DEEPCOMM_DEVICE void add_rows(const ExpertRows& rows, int32_t begin, int32_t first) {
        Vec128 terms[kTerms][kCount] = {};
        const auto bits = reinterpret_cast<uint64_t>(rows.mine.part);
        DEEPCOMM_UNROLL
        for (int32_t j = 0; j < kTerms; ++j) {
            if (begin + j >= rows.num) break;
            const uint64_t part = device::warp_shuffle(bits, begin + j);
            load(reinterpret_cast<const unsigned char*>(part), rows.num_vectors, first, terms[j]);
        }
        DEEPCOMM_UNROLL
        for (int32_t j = 0; j < kTerms; ++j) {
            if (begin + j >= rows.num) break;
            const float weight = device::warp_shuffle(rows.mine.weight, begin + j);
            DEEPCOMM_UNROLL
            for (int32_t i = 0; i < kCount; ++i) {
                Floats8 floats = floats_of(terms[j][i]);
                if (rows.has_weights) scale_by(&floats, weight);
                add_to(&sums[i], floats);
            }
        }
    }

    /// Stages zeros behind the vectors of a part that has fewer than others.
    template <typename Shared>
    DEEPCOMM_DEVICE void stage(int32_t num_vectors, int32_t first, Shared& shared) const {
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kCount; ++i) {
            const int32_t index = first + i * Spec::kNumThreads;
            if (index >= Spec::kPartVectors) continue;
            reinterpret_cast<Vec128*>(shared.row)[index] =
                index < num_vectors ? bf16_of(sums[i]) : Vec128{};
        }
    }

    /// Sums and stages the part.
    template <typename Shared>
    static DEEPCOMM_DEVICE void run(const ExpertRows& rows, const device::Block& block,
                                    Shared& shared) {
        DEEPCOMM_NO_UNROLL
        for (int32_t i = 0; i < kAll; i += kCount) {
            const int32_t first = block.thread_idx() + i * Spec::kNumThreads;
            PartialSum sum = {};
            DEEPCOMM_NO_UNROLL
            for (int32_t begin = 0; begin < rows.num; begin += kTerms) {
                sum.add_rows(rows, begin, first);
            }
            sum.stage(rows.num_vectors, first, shared);
        }
    }
};

}  // namespace deepcomm::kernels::low_latency
