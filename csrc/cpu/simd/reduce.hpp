// SPDX-License-Identifier: Apache-2.0
// The FP32 reduction of one row, for any instruction set V (see the note in vector.hpp on including
// this). Sums stay in registers for a block of columns; every row is read once.
#pragma once

#include "cpu/simd/simd.hpp"
#include "cpu/simd/vector.hpp"

namespace deepcomm::cpu {
namespace {

/// Columns [offset, offset + num_elements) of one reduction.
struct Columns {
    int64_t offset;
    int64_t num_elements;
};

/// Sums of a block of kPairs pairs of vectors. With kWhole the columns fill them; otherwise only the
/// first num_elements of a single pair exist in memory.
template <class V, class Codec, int kPairs, bool kWhole>
struct Block {
    static_assert(kWhole || kPairs == 1);
    static constexpr int kPairBytes = 2 * V::kLanes * Codec::kElementBytes;

    Pair<V> sums[kPairs];

    /// PERF(Zen 5, 2026-11): one by one; `= {}` keeps the sums in memory and costs 100 ns a block.
    Block() {
        for (int i = 0; i < kPairs; ++i) {
            sums[i].a = typename V::F32{};
            sums[i].b = typename V::F32{};
        }
    }

    static Pair<V> load_pair(const char* src, int64_t num_elements) {
        if constexpr (kWhole) return Codec::load_pair(src);
        char padded[kPairBytes] = {};
        std::memcpy(padded, src, static_cast<size_t>(num_elements * Codec::kElementBytes));
        return Codec::load_pair(padded);
    }

    template <bool kWeighted>
    void add_row(const void* row, float weight, Columns columns) {
        const char* src = static_cast<const char*>(row) + columns.offset * Codec::kElementBytes;
        for (int i = 0; i < kPairs; ++i) {
            Pair<V> x = load_pair(src + i * kPairBytes, columns.num_elements);
            if constexpr (kWhole) {
                for (int line = 0; line < kPairBytes; line += 64) {
                    __builtin_prefetch(src + i * kPairBytes + line + kPrefetchBytes);
                }
            }
            if constexpr (kWeighted) {
                x.a = weight * x.a;
                x.b = weight * x.b;
            }
            sums[i].a = sums[i].a + x.a;
            sums[i].b = sums[i].b + x.b;
        }
    }

    void add(const Block& other) {
        for (int i = 0; i < kPairs; ++i) {
            sums[i].a = sums[i].a + other.sums[i].a;
            sums[i].b = sums[i].b + other.sums[i].b;
        }
    }

    void write(void* row, Columns columns, bool stream) const {
        char* dst = static_cast<char*>(row) + columns.offset * Codec::kElementBytes;
        if constexpr (kWhole) {
            for (int i = 0; i < kPairs; ++i) {
                Codec::store_pair(dst + i * kPairBytes, sums[i], stream);
            }
        } else {
            char padded[kPairBytes];
            Codec::store_pair(padded, sums[0], false);
            std::memcpy(dst, padded,
                        static_cast<size_t>(columns.num_elements * Codec::kElementBytes));
        }
    }
};

/// A sum that starts at +0 is never -0, so adding it to +0, or a row to it through a sum of its own,
/// changes no bit: if only the first group has several rows, all rows can go to one sum.
inline bool is_flat(const ReduceArgs& args) {
    for (int32_t group = 1; group < args.num_groups; ++group) {
        if (args.group_sizes[group] > 1) return false;
    }
    return true;
}

struct Shape {
    int64_t num_rows;
    bool flat;
};

template <class B, bool kWeighted>
inline void reduce_block(const ReduceArgs& args, Shape shape, Columns columns) {
    const auto weight = [&](int64_t row) { return kWeighted ? args.weights[row] : 1.0f; };
    B total;
    if (shape.flat) {
        for (int64_t row = 0; row < shape.num_rows; ++row) {
            total.template add_row<kWeighted>(args.rows[row], weight(row), columns);
        }
    } else {
        int64_t row = 0;
        for (int32_t group = 0; group < args.num_groups; ++group) {
            B partial;
            const int64_t end = row + args.group_sizes[group];
            for (; row < end; ++row) {
                partial.template add_row<kWeighted>(args.rows[row], weight(row), columns);
            }
            total.add(partial);
        }
    }
    if (args.bias != nullptr) total.template add_row<false>(args.bias, 1.0f, columns);
    total.write(args.dst, columns, args.stream);
}

/// Elements before the first whole vector of dst, where that can be streamed.
template <class V, class Codec>
inline int64_t num_head_elements(const ReduceArgs& args) {
    const auto misaligned = reinterpret_cast<uintptr_t>(args.dst) % V::kVectorBytes;
    const auto head_bytes =
        static_cast<int64_t>(misaligned == 0 ? 0 : V::kVectorBytes - misaligned);
    const int64_t head = head_bytes / Codec::kElementBytes;
    return head < args.num_elements ? head : args.num_elements;
}

template <class V, class Codec, bool kWeighted>
void reduce_row(ReduceArgs args) {
    constexpr int64_t kPair = 2 * V::kLanes;
    constexpr int64_t kBlock = V::kReducePairs * kPair;
    using Partial = Block<V, Codec, 1, false>;
    int64_t num_rows = 0;
    for (int32_t group = 0; group < args.num_groups; ++group) num_rows += args.group_sizes[group];
    const Shape shape{num_rows, is_flat(args)};

    // A dst that no whole number of elements aligns cannot be streamed.
    args.stream = args.stream && reinterpret_cast<uintptr_t>(args.dst) % Codec::kElementBytes == 0;
    int64_t offset = args.stream ? num_head_elements<V, Codec>(args) : 0;
    const int64_t end = args.num_elements;
    if (offset > 0) reduce_block<Partial, kWeighted>(args, shape, {0, offset});
    for (; offset + kBlock <= end; offset += kBlock) {
        using Whole = Block<V, Codec, V::kReducePairs, true>;
        reduce_block<Whole, kWeighted>(args, shape, {offset, kBlock});
    }
    for (; offset + kPair <= end; offset += kPair) {
        reduce_block<Block<V, Codec, 1, true>, kWeighted>(args, shape, {offset, kPair});
    }
    if (offset < end) reduce_block<Partial, kWeighted>(args, shape, {offset, end - offset});
}

template <class V, class Codec>
void reduce_typed(const ReduceArgs& args) {
    args.weights == nullptr ? reduce_row<V, Codec, false>(args) : reduce_row<V, Codec, true>(args);
}

template <class V>
void reduce(const ReduceArgs& args) {
    switch (args.dtype) {
        case DType::kBf16: return reduce_typed<V, Bf16Codec<V>>(args);
        case DType::kF16: return reduce_typed<V, F16Codec<V>>(args);
        default: return reduce_typed<V, F32Codec<V>>(args);
    }
}

}  // namespace
}  // namespace deepcomm::cpu
