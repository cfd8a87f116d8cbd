// SPDX-License-Identifier: Apache-2.0
// Byte map of one rank's symmetric memory for high-throughput operations on GPUs.
//
//   headers[2][R] | counts[2][R][O][R + E] | arrived[R] | sent_chunks[R][C]
//   | pushed_chunks[O * R][D] | lost[2][R] | generation 0: rows, scales, topk_idx, weights, slots
//   | generation 1 ... | combine: rows, weights
//
// C chunks of kSendChunk tokens, D chunks of kPushChunk rows, O origins (layout/plan.hpp). Words are
// written by the rank whose index they have and read by their owner; [2] is the parity of the
// operation's epoch. Every region begins at a multiple of kRegionAlign. Zeroed once; nothing is ever
// reset.
//
// A mirror is memory of one rank that stands for a peer's out of reach: kernels write to it what they
// would write there, and a network takes it on (PROTOCOLS.md: carried rails). It has the same words, and
// room for what one rank brings; areas of rows are smaller, so that they begin elsewhere.
#pragma once

#include "common/types.hpp"
#include "layout/cursor.hpp"

namespace deepcomm::layout {

constexpr int32_t kExchangeVersion = 3;
constexpr int64_t kRegionAlign = 1024;
constexpr int32_t kSendChunk = 8;     ///< tokens announced together to a rank that expands them
constexpr int32_t kPushChunk = 4;     ///< rows of a combine announced together
constexpr uint32_t kArrivals = 1024;  ///< what the blocks of a rank add up to in one exchange
constexpr int64_t kPacketBytes = 16;

struct ExchangeShape {
    int32_t num_ranks;
    int32_t num_experts;
    int32_t num_topk;
    int32_t hidden;
    int32_t max_tokens;
    int32_t num_generations;
    int32_t num_origins;
    int32_t is_mirror;  ///< rows of one rank find room, not those of all

    constexpr int32_t num_counters() const { return num_origins * (num_ranks + num_experts); }
    constexpr int64_t max_rows() const {
        return static_cast<int64_t>(is_mirror ? 1 : num_ranks) * max_tokens;
    }
    constexpr int64_t row_bytes() const { return int64_t{2} * hidden; }
    constexpr int64_t num_tiles() const { return ceil_div(hidden, kScaleTile); }
    /// Most rows that come back to one rank from its peers.
    constexpr int64_t max_combine_rows() const {
        const int64_t peers = is_mirror ? 1 : num_ranks - 1;
        return max_tokens * (peers < num_topk ? peers : num_topk);
    }
    constexpr int32_t max_send_chunks() const {
        return static_cast<int32_t>(ceil_div(max_tokens, kSendChunk));
    }
    constexpr int32_t max_push_chunks() const {
        return static_cast<int32_t>(ceil_div(max_tokens, kPushChunk));
    }
};

/// Offsets of one landing area, from its begin.
struct LandingOffsets {
    int64_t rows;          ///< [R * T, row bytes], dense
    int64_t scales;        ///< [R * T, 4 * S]
    int64_t topk_idx;      ///< int32 or int64 [R * T, K], local expert ids
    int64_t topk_weights;  ///< float [R * T, K]
    int64_t slots;         ///< int32 [R * T, K], rows of the expert layouts
};

/// Where rows are, from the begin of a block of memory.
struct RowAreas {
    int64_t generations;
    int64_t generation_stride;
    LandingOffsets landing;
    int64_t combine_rows;
    int64_t combine_weights;

    constexpr int64_t generation(int32_t index) const {
        return generations + index * generation_stride;
    }
};

struct ExchangeLayout {
    int64_t headers;
    int64_t counts;
    int64_t arrived;
    int64_t sent_chunks;
    int64_t pushed_chunks;
    int64_t lost;
    RowAreas areas;
    int64_t total_bytes;
    ExchangeShape shape;

    static constexpr LandingOffsets make_landing(const ExchangeShape& shape, Cursor* cursor) {
        LandingOffsets landing{};
        const int64_t max_rows = shape.max_rows();
        landing.rows = cursor->take(max_rows * shape.row_bytes(), kRegionAlign);
        landing.scales = cursor->take(max_rows * 4 * shape.num_tiles(), kRegionAlign);
        landing.topk_idx = cursor->take(max_rows * 8 * shape.num_topk, kRegionAlign);
        landing.topk_weights = cursor->take(max_rows * 4 * shape.num_topk, kRegionAlign);
        landing.slots = cursor->take(max_rows * 4 * shape.num_topk, kRegionAlign);
        return landing;
    }

    static constexpr RowAreas make_areas(const ExchangeShape& shape, Cursor* cursor) {
        RowAreas areas{};
        Cursor one;
        areas.landing = make_landing(shape, &one);
        areas.generation_stride = one.end(kRegionAlign);
        areas.generations =
            cursor->take(areas.generation_stride * shape.num_generations, kRegionAlign);
        areas.combine_rows =
            cursor->take(shape.max_combine_rows() * shape.row_bytes(), kRegionAlign);
        areas.combine_weights =
            cursor->take(shape.max_combine_rows() * 4 * shape.num_topk, kRegionAlign);
        return areas;
    }

    static constexpr ExchangeLayout make(const ExchangeShape& shape) {
        ExchangeLayout map{};
        map.shape = shape;
        const int64_t ranks = shape.num_ranks;
        Cursor cursor;
        map.headers = cursor.take(2 * ranks * 2 * kPacketBytes, kRegionAlign);
        map.counts = cursor.take_array<uint64_t>(2 * ranks * shape.num_counters(), kRegionAlign);
        map.arrived = cursor.take_array<uint32_t>(ranks, kRegionAlign);
        map.sent_chunks = cursor.take(ranks * shape.max_send_chunks() * kPacketBytes, kRegionAlign);
        map.pushed_chunks = cursor.take_array<uint32_t>(
            shape.num_origins * ranks * shape.max_push_chunks(), kRegionAlign);
        map.lost = cursor.take_array<uint64_t>(2 * ranks, kRegionAlign);
        map.areas = make_areas(shape, &cursor);
        map.total_bytes = cursor.end(kRegionAlign);
        return map;
    }

    static constexpr ExchangeLayout make_mirror(ExchangeShape shape) {
        shape.is_mirror = 1;
        return make(shape);
    }

    // ---- offsets of words, from the begin of the block of the rank that reads them

    /// Two packets of rank src in its operation of that epoch.
    constexpr int64_t header(uint32_t epoch, int32_t src) const {
        return headers + ((epoch & 1) * shape.num_ranks + src) * 2 * kPacketBytes;
    }
    /// Of rank src, origin by origin: its tokens for each rank, then its pairs for each expert.
    constexpr int64_t counts_of(uint32_t epoch, int32_t src) const {
        return counts + ((epoch & 1) * shape.num_ranks + src) * int64_t{8} * shape.num_counters();
    }
    constexpr int64_t arrived_from(int32_t src) const { return arrived + 4 * src; }
    constexpr int64_t sent_chunk(int32_t src, int32_t chunk) const {
        return sent_chunks +
               (static_cast<int64_t>(src) * shape.max_send_chunks() + chunk) * kPacketBytes;
    }
    /// Of a block of rows that come back (layout/plan.hpp).
    constexpr int64_t pushed_chunk(int32_t block, int32_t chunk) const {
        return pushed_chunks + (static_cast<int64_t>(block) * shape.max_push_chunks() + chunk) * 4;
    }
    /// Whether rank src, which sends tokens on inside its node, has lost some of the reader's.
    constexpr int64_t lost_at(uint32_t epoch, int32_t src) const {
        return lost + ((epoch & 1) * shape.num_ranks + src) * 8;
    }
};

namespace exchange_example {  // 2 ranks, 4 experts, K = 2, H = 64, T = 8, 1 generation, 1 origin

constexpr ExchangeLayout kMap = ExchangeLayout::make({2, 4, 2, 64, 8, 1, 1, 0});
constexpr ExchangeLayout kMirror = ExchangeLayout::make_mirror(kMap.shape);
static_assert(kMap.headers == 0 && kMap.counts == 1024 && kMap.arrived == 2048, "drawing above");
static_assert(kMap.sent_chunks == 3072 && kMap.pushed_chunks == 4096, "drawing above");
static_assert(kMap.lost == 5120 && kMap.areas.generations == 6144, "drawing above");
static_assert(kMap.areas.landing.scales == 2048, "drawing above");
static_assert(kMirror.lost == kMap.lost && kMirror.areas.landing.scales == 1024, "same words");
static_assert(kMap.header(3, 1) == 96 && kMap.counts_of(2, 1) == 1024 + 48, "drawing above");

}  // namespace exchange_example

}  // namespace deepcomm::layout
