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
    int32_t num_vectors;  ///< of the part
};

/// The threads that sum a part together: a thread takes vectors first, first + stride, ...
struct Summers {
    int32_t first;
    int32_t stride;
};

/// A thread's vectors of a part of several rows, as many as it adds at once: their loads fly before the first is
/// added, and those of the part that comes next while this one's packets are stored, which takes as long as the
/// link does.
template <typename Spec>
struct PartTerms {
    static constexpr int kTerms = 8;
    static constexpr int kAll = (Spec::kPartVectors + Spec::kNumSummers - 1) / Spec::kNumSummers;
    static constexpr int kCount = kAll < 2 ? kAll : 2;

    Vec128 vectors[kTerms][kCount];

    /// Rows begin, begin + 1, ...
    DEEPCOMM_DEVICE void load(const ExpertRows& rows, int32_t begin, const Summers& summers) {
        const auto bits = reinterpret_cast<uint64_t>(rows.mine.part);
        DEEPCOMM_UNROLL
        for (int32_t j = 0; j < kTerms; ++j) {
            if (begin + j >= rows.num) break;
            const uint64_t part = device::warp_shuffle(bits, begin + j);
            DEEPCOMM_UNROLL
            for (int32_t i = 0; i < kCount; ++i) {
                const int32_t index = summers.first + i * summers.stride;
                if (index >= rows.num_vectors) continue;
                vectors[j][i] =
                    device::ld_weak_streaming(reinterpret_cast<const Vec128*>(part) + index);
            }
        }
    }

    /// Adds them, by ascending expert.
    DEEPCOMM_DEVICE void add_to(Floats8 (&sums)[kCount], const ExpertRows& rows, int32_t begin,
                                bool has_weights) const {
        DEEPCOMM_UNROLL
        for (int32_t j = 0; j < kTerms; ++j) {
            if (begin + j >= rows.num) break;
            const float weight = device::warp_shuffle(rows.mine.weight, begin + j);
            DEEPCOMM_UNROLL
            for (int32_t i = 0; i < kCount; ++i) {
                Floats8 floats = floats_of(vectors[j][i]);
                if (has_weights) scale_by(&floats, weight);
                kernels::add_to(&sums[i], floats);
            }
        }
    }
};

/// Sums a part in FP32 and stages it, zeros behind it where it is shorter than others; terms: the first of
/// them are on their way.
template <typename Shared>
DEEPCOMM_DEVICE void sum_part(const ExpertRows& rows, bool has_weights, Summers summers,
                              PartTerms<typename Shared::Spec>& terms, Shared& shared) {
    using Spec = typename Shared::Spec;
    using Terms = PartTerms<Spec>;
    bool is_loaded = true;
    DEEPCOMM_NO_UNROLL
    for (int32_t done = 0; done < Spec::kPartVectors; done += Terms::kCount * summers.stride) {
        Floats8 sums[Terms::kCount] = {};
        DEEPCOMM_NO_UNROLL
        for (int32_t begin = 0; begin < rows.num; begin += Terms::kTerms) {
            if (!is_loaded) terms.load(rows, begin, summers);
            terms.add_to(sums, rows, begin, has_weights);
            is_loaded = false;
        }
        DEEPCOMM_UNROLL
        for (int32_t j = 0; j < Terms::kCount; ++j) {
            const int32_t index = summers.first + j * summers.stride;
            if (index >= Spec::kPartVectors) continue;
            reinterpret_cast<Vec128*>(shared.row)[index] =
                index < rows.num_vectors ? bf16_of(sums[j]) : Vec128{};
        }
        if constexpr (Terms::kCount == Terms::kAll) break;
        summers.first += Terms::kCount * summers.stride;
    }
}

}  // namespace deepcomm::kernels::low_latency
