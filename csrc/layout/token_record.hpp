// SPDX-License-Identifier: Apache-2.0
// One token as it travels in one piece: over a rail, or into a low-latency region.
//
//   0            row_bytes     +scale_bytes      +4K          +4K        stride (multiple of 64)
//   +------------+-------------+-----------------+------------+----------+
//   | row        | scales      | topk_idx int32  | weights f32| (unused) |
//   +------------+-------------+-----------------+------------+----------+
//   each field begins at a multiple of 16; H=7168 FP8, 56 FP32 scales, K=8:
//   0, 7168, 7392, 7424, stride 7488
#pragma once

#include "layout/cursor.hpp"

namespace deepcomm::layout {

constexpr int64_t kFieldAlign = 16;
constexpr int64_t kRecordAlign = 64;

struct TokenRecord {
    int64_t row_bytes = 0;
    int64_t scale_bytes = 0;
    int64_t scales_offset = 0;
    int64_t topk_idx_offset = 0;
    int64_t topk_weights_offset = 0;
    int64_t stride = 0;

    static constexpr TokenRecord make(int64_t row_bytes, int64_t scale_bytes, int32_t num_topk) {
        TokenRecord record;
        Cursor cursor;
        record.row_bytes = row_bytes;
        record.scale_bytes = scale_bytes;
        cursor.take(row_bytes, kFieldAlign);
        record.scales_offset = cursor.take(scale_bytes, kFieldAlign);
        record.topk_idx_offset = cursor.take_array<int32_t>(num_topk, kFieldAlign);
        record.topk_weights_offset = cursor.take_array<float>(num_topk, kFieldAlign);
        record.stride = cursor.end(kRecordAlign);
        return record;
    }
};

static_assert(TokenRecord::make(7168, 224, 8).scales_offset == 7168, "drawing above");
static_assert(TokenRecord::make(7168, 224, 8).topk_idx_offset == 7392, "drawing above");
static_assert(TokenRecord::make(7168, 224, 8).topk_weights_offset == 7424, "drawing above");
static_assert(TokenRecord::make(7168, 224, 8).stride == 7488, "drawing above");

}  // namespace deepcomm::layout
