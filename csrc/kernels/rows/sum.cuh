// SPDX-License-Identifier: Apache-2.0
// The sum of a few BF16 rows in FP32, by one warp, in a fixed order. PROTOCOLS.md: combine.
#pragma once

#include "device/device.cuh"

namespace deepcomm::kernels {

constexpr int32_t kSumUnroll = 4;  ///< vectors of each lane that are summed together
constexpr int32_t kVectorsAtOnce = kSumUnroll * device::kWarpSize;
constexpr int32_t kChannelsOfVector = 8;
constexpr uint32_t kNanPair = 0x7FFF7FFFu;

/// A lane's row to add, if it has one; terms are added in ascending order of their keys.
struct Term {
    const unsigned char* row;
    int32_t key;  ///< -1: none
    float weight;
    bool is_sum = false;  ///< FP32: what a node has summed already
};

/// What is added up: rows of ranks, or rows and sums of nodes.
enum SumKind { kSumRanks, kSumNodes };

/// Lanes of the terms in their order.
struct TermOrder {
    int32_t count;
    int32_t position;  ///< of this lane's term, or -1
};

DEEPCOMM_DEVICE TermOrder order_terms(int32_t key) {
    const uint32_t terms = device::warp_ballot(key >= 0);
    TermOrder order = {device::popcount(terms), key < 0 ? -1 : 0};
    for (uint32_t left = terms; left != 0; left &= left - 1) {
        const int32_t other = device::warp_shuffle(key, device::lowest_bit(left));
        if (key >= 0 && other < key) ++order.position;
    }
    return order;
}

/// The term at a position, in every lane.
template <SumKind kKind>
DEEPCOMM_DEVICE Term term_at(const Term& own, const TermOrder& order, int32_t position) {
    const int32_t lane = device::lowest_bit(device::warp_ballot(order.position == position));
    const auto bits = reinterpret_cast<uint64_t>(own.row);
    const uint64_t row = device::warp_shuffle(bits, lane);
    Term term = {reinterpret_cast<const unsigned char*>(row), 0, 1.0f};
    if (kKind == kSumNodes) term.is_sum = (device::warp_ballot(own.is_sum) >> lane & 1) != 0;
    return term;
}

/// What becomes of a sum.
struct SumTarget {
    unsigned char* out;
    float* floats;              ///< in its place, unrounded; or null
    const unsigned char* bias;  ///< or null
    bool is_lost;               ///< write NaN
};

struct Floats8 {
    float values[8];
};

DEEPCOMM_DEVICE Floats8 floats_of(const device::Vec128& vector) {
    Floats8 floats;
    DEEPCOMM_UNROLL
    for (int32_t i = 0; i < 4; ++i) {
        floats.values[2 * i] = device::bf16x2_low(vector.words[i]);
        floats.values[2 * i + 1] = device::bf16x2_high(vector.words[i]);
    }
    return floats;
}

DEEPCOMM_DEVICE device::Vec128 bf16_of(const Floats8& floats) {
    device::Vec128 vector;
    DEEPCOMM_UNROLL
    for (int32_t i = 0; i < 4; ++i) {
        vector.words[i] =
            device::bf16x2_from_floats(floats.values[2 * i], floats.values[2 * i + 1]);
    }
    return vector;
}

DEEPCOMM_DEVICE void add_to(Floats8* sum, const Floats8& terms) {
    DEEPCOMM_UNROLL
    for (int32_t i = 0; i < 8; ++i) {
        sum->values[i] = device::fadd_rn(sum->values[i], terms.values[i]);
    }
}

DEEPCOMM_DEVICE void scale_by(Floats8* floats, float weight) {
    DEEPCOMM_UNROLL
    for (int32_t i = 0; i < 8; ++i) floats->values[i] = device::fmul_rn(weight, floats->values[i]);
}

template <int32_t kNumVectors>
struct RowVectors {
    device::Vec128 vectors[kSumUnroll];

    /// Vectors first, first + 32, ...
    DEEPCOMM_DEVICE void load(const unsigned char* row, int32_t first) {
        const auto* from = reinterpret_cast<const device::Vec128*>(row);
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kSumUnroll; ++i) {
            const int32_t index = first + i * device::kWarpSize;
            if (index < kNumVectors) vectors[i] = device::ld_weak_streaming(from + index);
        }
    }
};

/// Adds vectors first, first + 32, ... of a sum that is FP32 already.
template <int32_t kNumVectors>
DEEPCOMM_DEVICE void add_sum(Floats8 (&sums)[kSumUnroll], const unsigned char* row, int32_t first) {
    const auto* from = reinterpret_cast<const device::Vec128*>(row);
    DEEPCOMM_UNROLL
    for (int32_t i = 0; i < kSumUnroll; ++i) {
        const int32_t index = first + i * device::kWarpSize;
        if (index >= kNumVectors) continue;
        const device::Vec128 halves[] = {device::ld_weak_streaming(from + 2 * index),
                                         device::ld_weak_streaming(from + 2 * index + 1)};
        Floats8 floats;
        DEEPCOMM_UNROLL
        for (int32_t j = 0; j < 8; ++j) {
            floats.values[j] = device::float_from_bits(halves[j / 4].words[j % 4]);
        }
        add_to(&sums[i], floats);
    }
}

/// Stores vectors first, first + 32, ... of the sum unrounded.
template <int32_t kNumVectors, int32_t kUnroll>
DEEPCOMM_DEVICE void store_floats(const Floats8 (&sums)[kUnroll], const SumTarget& target,
                                  int32_t first) {
    auto* out = reinterpret_cast<device::Vec128*>(target.floats);
    DEEPCOMM_UNROLL
    for (int32_t i = 0; i < kUnroll; ++i) {
        const int32_t index = first + i * device::kWarpSize;
        if (index >= kNumVectors) continue;
        device::Vec128 halves[2];
        DEEPCOMM_UNROLL
        for (int32_t j = 0; j < 8; ++j) {
            halves[j / 4].words[j % 4] =
                target.is_lost ? kNanBits : device::float_bits(sums[i].values[j]);
        }
        out[2 * index] = halves[0];
        out[2 * index + 1] = halves[1];
    }
}

/// Finishes and stores vectors first, first + 32, ... of the sum.
template <int32_t kNumVectors, int32_t kUnroll>
DEEPCOMM_DEVICE void store_sum(Floats8 (&sums)[kUnroll], const SumTarget& target, int32_t first) {
    if (target.floats != nullptr) {
        store_floats<kNumVectors>(sums, target, first);
        return;
    }
    auto* out = reinterpret_cast<device::Vec128*>(target.out);
    const auto* bias = reinterpret_cast<const device::Vec128*>(target.bias);
    DEEPCOMM_UNROLL
    for (int32_t i = 0; i < kUnroll; ++i) {
        const int32_t index = first + i * device::kWarpSize;
        if (index >= kNumVectors) continue;
        if (bias != nullptr) add_to(&sums[i], floats_of(bias[index]));
        device::Vec128 vector = bf16_of(sums[i]);
        if (target.is_lost) vector = {{kNanPair, kNanPair, kNanPair, kNanPair}};
        device::st_weak_streaming(out + index, vector);
    }
}

template <SumKind kKind>
DEEPCOMM_DEVICE bool is_sum(const Term& term) {
    return kKind == kSumNodes && term.is_sum;
}

template <SumKind kKind, int32_t kNumVectors>
DEEPCOMM_DEVICE void load_term(const Term& term, int32_t first, RowVectors<kNumVectors>* vectors) {
    if (!is_sum<kKind>(term)) vectors->load(term.row, first);
}

template <SumKind kKind, int32_t kNumVectors>
DEEPCOMM_DEVICE void add_term(Floats8 (&sums)[kSumUnroll], const Term& term,
                              const RowVectors<kNumVectors>& vectors, int32_t first) {
    if (is_sum<kKind>(term)) {
        add_sum<kNumVectors>(sums, term.row, first);
        return;
    }
    DEEPCOMM_UNROLL
    for (int32_t i = 0; i < kSumUnroll; ++i) add_to(&sums[i], floats_of(vectors.vectors[i]));
}

/// All lanes of a warp. Two terms are loaded together: what a warp has in flight, not its arithmetic,
/// decides how fast rows are read.
template <int32_t kHidden, SumKind kKind>
DEEPCOMM_DEVICE void sum_terms(const Term& own, const TermOrder& order, const SumTarget& target) {
    constexpr int32_t kNumVectors = kHidden / kChannelsOfVector;
    const int32_t lane = device::Warp{}.thread_idx();
    const int32_t count = target.is_lost ? 0 : order.count;
    for (int32_t begin = 0; begin < kNumVectors; begin += kVectorsAtOnce) {
        const int32_t first = begin + lane;
        Floats8 sums[kSumUnroll] = {};
        for (int32_t j = 0; j < count; j += 2) {
            RowVectors<kNumVectors> vectors[2]{};
            const Term one = term_at<kKind>(own, order, j);
            load_term<kKind>(one, first, &vectors[0]);
            Term two{};
            const bool are_two = j + 1 < count;
            if (are_two) {
                two = term_at<kKind>(own, order, j + 1);
                load_term<kKind>(two, first, &vectors[1]);
            }
            add_term<kKind>(sums, one, vectors[0], first);
            if (are_two) add_term<kKind>(sums, two, vectors[1], first);
        }
        store_sum<kNumVectors>(sums, target, first);
    }
}

}  // namespace deepcomm::kernels
