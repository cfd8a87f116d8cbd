// SPDX-License-Identifier: Apache-2.0
// Byte map of one rank's shared segment on the CPU backend. Offsets only; csrc/cpu/control.hpp
// holds the types that live there.
//
//   control | arrivals[R] | announcements[N][2] | low-latency headers[S][R], weight flags[S][R]
//   | combine ring | generation 0: topk_idx, weights, source tokens, scales, rows | generation 1 ...
//   | slot 0: weights, blocks | ...
//
// Every region begins at a page. Rows and blocks are sparse: the address range is sized for the
// widest case, memory is reserved for what the configuration or an operation really needs.
#pragma once

#include "common/types.hpp"
#include "layout/cursor.hpp"

namespace deepcomm::layout {

constexpr int64_t kPage = 4096;
constexpr int64_t kCacheLine = 64;
constexpr int64_t kControlBytes = kPage;
constexpr int64_t kAnnouncementHeadBytes = 512;
constexpr int64_t kBlockHeaderBytes = 512;
constexpr int64_t kWidestItemBytes = 4;   // float32 rows
constexpr int64_t kDefaultItemBytes = 2;  // what construction reserves: bfloat16 rows
constexpr int64_t kRingDepth = 3;         // blocks of combine rows between two ranks
constexpr int64_t kRingBytes =
    4 << 20;  // a rank's ring: all rings of a node stay in a shared cache

struct SegmentShape {
    int32_t num_ranks;
    int32_t num_nodes;
    int32_t num_experts;
    int32_t num_topk;
    int32_t hidden;
    int32_t max_tokens;
    int32_t num_generations;
    int32_t num_slots;

    constexpr int64_t num_local_experts() const { return num_experts / num_ranks; }
    constexpr int64_t max_rows() const { return static_cast<int64_t>(num_ranks) * max_tokens; }
    constexpr int64_t num_tiles() const { return ceil_div(hidden, kScaleTile); }
    constexpr int64_t max_copies() const {
        return num_topk < num_local_experts() ? num_topk : num_local_experts();
    }
};

/// Offsets of one landing area.
struct GenerationOffsets {
    int64_t topk_idx;      ///< int32 [max_rows, K], local expert ids
    int64_t topk_weights;  ///< float [max_rows, K]
    int64_t source_token;  ///< int32 [max_rows], index of the row's token at its source
    int64_t scales;        ///< [max_rows, 4 * tiles] bytes
    int64_t rows;          ///< rows, dense
};

struct SegmentLayout {
    int64_t arrivals;
    int64_t announcements;
    int64_t announcement_stride;
    int64_t block_headers;
    int64_t weight_flags;
    int64_t ring;
    int64_t ring_bytes;
    int64_t generations;
    int64_t generation_stride;
    GenerationOffsets generation;  ///< relative to the generation's begin
    int64_t rows_capacity;         ///< bytes of address range for rows
    int64_t slots;
    int64_t slot_stride;
    int64_t slot_blocks;     ///< relative to the slot's begin; its weights come first
    int64_t block_capacity;  ///< bytes of address range for one slot's blocks
    int64_t total_bytes;

    static constexpr SegmentLayout make(const SegmentShape& shape) {
        SegmentLayout map{};
        Cursor cursor;
        cursor.take(kControlBytes, kPage);
        map.arrivals = cursor.take(shape.num_ranks * kCacheLine, kCacheLine);
        map.announcement_stride = round_up(
            kAnnouncementHeadBytes +
                4 * (static_cast<int64_t>(shape.num_ranks) + shape.num_nodes + shape.num_experts),
            kCacheLine);
        map.announcements = cursor.take(2 * shape.num_nodes * map.announcement_stride, kCacheLine);
        const int64_t num_blocks = static_cast<int64_t>(shape.num_slots) * shape.num_ranks;
        map.block_headers = cursor.take(num_blocks * kBlockHeaderBytes, kCacheLine);
        map.weight_flags = cursor.take(num_blocks * kCacheLine, kCacheLine);

        const int64_t ring_row =
            kRingDepth * (shape.num_ranks / shape.num_nodes) * shape.hidden * kWidestItemBytes;
        map.ring_bytes = ring_row * shape.max_tokens < kRingBytes ? ring_row * shape.max_tokens
                         : ring_row > kRingBytes                  ? ring_row
                                                                  : kRingBytes;
        map.ring = cursor.take(map.ring_bytes, kPage);

        const int64_t topk_items = shape.max_rows() * shape.num_topk;
        Cursor one;
        map.generation.topk_idx = one.take_array<int32_t>(topk_items, kPage);
        map.generation.topk_weights = one.take_array<float>(topk_items, kPage);
        map.generation.source_token = one.take_array<int32_t>(shape.max_rows(), kPage);
        map.generation.scales = one.take(shape.max_rows() * shape.num_tiles() * 4, kPage);
        map.rows_capacity = shape.max_rows() * shape.hidden * kWidestItemBytes * shape.max_copies();
        map.generation.rows = one.take(map.rows_capacity, kPage);
        map.generation_stride = one.end(kPage);
        map.generations = cursor.take(map.generation_stride * shape.num_generations, kPage);

        Cursor slot;
        slot.take_array<float>(topk_items, kPage);
        map.block_capacity =
            shape.max_rows() * round_up(shape.hidden * kWidestItemBytes + shape.num_tiles() * 4 +
                                            8 * shape.num_topk + 4 * kFieldAlignSlack,
                                        kCacheLine);
        map.slot_blocks = slot.take(map.block_capacity, kPage);
        map.slot_stride = slot.end(kPage);
        map.slots = cursor.take(map.slot_stride * shape.num_slots, kPage);
        map.total_bytes = cursor.end(kPage);
        return map;
    }

    constexpr int64_t generation_begin(int32_t index) const {
        return generations + index * generation_stride;
    }
    constexpr int64_t slot_begin(int32_t index) const { return slots + index * slot_stride; }

    /// Bytes that construction reserves before the first generation.
    constexpr int64_t control_bytes() const { return generations; }
    /// Tokens of one block of the combine ring, for rows of row_bytes.
    constexpr int64_t ring_tokens(int32_t ranks_per_node, int64_t row_bytes) const {
        return ring_bytes / (kRingDepth * ranks_per_node * row_bytes);
    }
    /// Bytes that construction reserves in each generation.
    constexpr int64_t reserved_generation_bytes(const SegmentShape& shape) const {
        return generation.rows + shape.max_rows() * shape.hidden * kDefaultItemBytes;
    }
    /// Bytes of symmetric memory of a freshly constructed rank.
    constexpr int64_t reserved_bytes(const SegmentShape& shape) const {
        return control_bytes() + shape.num_generations * reserved_generation_bytes(shape);
    }

    static constexpr int64_t kFieldAlignSlack = 16;
};

}  // namespace deepcomm::layout
