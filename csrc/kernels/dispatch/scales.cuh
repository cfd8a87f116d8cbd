// SPDX-License-Identifier: Apache-2.0
// dispatch_scales: turns the scales of the expert layouts from rows, as they arrive, to the columns
// that grouped GEMMs take. Written a row at a time, columns would cost a sector a word.
#pragma once

#include "device/device.cuh"
#include "kernels/dispatch/params.hpp"

namespace deepcomm::kernels {

// As many as an SM holds at 64 registers a thread: with 4 loads each, 64 KiB are in flight.
constexpr int32_t kScaleThreads = 1024;
constexpr int32_t kPatch = 4;  ///< rows, and words, that a lane turns in its registers
// A warp's patches: 64 bytes of each row are whole sectors, and 128 of each column.
constexpr int32_t kPatchesDown = 8;
constexpr int32_t kPatchesAcross = device::kWarpSize / kPatchesDown;

/// The first num_rows x num_words of a patch, whose rows are a stride apart; zeros stand for the others.
DEEPCOMM_DEVICE void load_patch(const uint32_t* from, int32_t stride, int32_t num_rows,
                                int32_t num_words, device::Vec128 (&rows)[kPatch]) {
    const bool has_vectors = stride % kPatch == 0;
    DEEPCOMM_UNROLL
    for (int32_t i = 0; i < kPatch; ++i) {
        rows[i] = device::Vec128{};
        if (has_vectors && i < num_rows) {
            rows[i] = *reinterpret_cast<const device::Vec128*>(from + i * stride);
        }
    }
    if (has_vectors) return;
    DEEPCOMM_UNROLL
    for (int32_t i = 0; i < kPatch * kPatch; ++i) {
        const int32_t row = i / kPatch, word = i % kPatch;
        if (row < num_rows && word < num_words) rows[row].words[word] = from[row * stride + word];
    }
}

/// A lane's patch of a block: rows and words from (row, word) on. Rows from num_rows on are stored as
/// zeros, up to a whole vector: columns have room for it.
DEEPCOMM_DEVICE void turn_patch(const ScaleParams& params, int64_t block_idx, int32_t num_rows,
                                int32_t row, int32_t word) {
    const int32_t num_words = params.scale_words - word;
    if (row >= num_rows || num_words <= 0) return;
    const int64_t first_row = block_idx * params.block_rows + row;
    const uint32_t* from = params.rows + first_row * params.scale_words + word;
    device::Vec128 rows[kPatch];
    load_patch(from, params.scale_words, num_rows - row, num_words, rows);
    const int64_t first_column = block_idx * params.scale_words + word;
    uint32_t* to = params.columns + first_column * params.column_words + row;
    DEEPCOMM_UNROLL
    for (int32_t i = 0; i < kPatch; ++i) {
        if (i >= num_words) continue;
        const device::Vec128 column = {
            {rows[0].words[i], rows[1].words[i], rows[2].words[i], rows[3].words[i]}};
        *reinterpret_cast<device::Vec128*>(to + i * params.column_words) = column;
    }
}

extern "C" __global__ void __launch_bounds__(kScaleThreads)
    dispatch_scales(const __grid_constant__ ScaleParams params) {
    const device::Block block;
    const device::Warp warp;
    const int32_t num_warps = block.size() / warp.size();
    const int32_t num_workers = block.num_blocks() * num_warps;
    const int32_t lane = warp.thread_idx();
    const int32_t row = lane % kPatchesDown * kPatch, word = lane / kPatchesDown * kPatch;
    const auto tiles_across =
        static_cast<int32_t>(ceil_div(params.scale_words, kPatchesAcross * kPatch));
    // Neighbours in a block's tiles go to different SMs, so that few tiles keep all of them busy.
    int32_t next = warp.warp_idx() * block.num_blocks() + block.block_idx();
    for (int32_t first = 0; first < params.num_blocks; first += warp.size()) {
        int32_t used = first + lane < params.num_blocks ? params.used_rows[first + lane] : 0;
        // Of an operation that was refused, the words say nothing.
        used = used < 0 ? 0 : used < params.block_rows ? used : params.block_rows;
        for (int32_t i = 0; i < warp.size() && first + i < params.num_blocks; ++i) {
            const int32_t num_rows = device::warp_shuffle(used, i);
            const auto tiles_down = static_cast<int32_t>(ceil_div(num_rows, kPatchesDown * kPatch));
            for (; next < tiles_down * tiles_across; next += num_workers) {
                const int32_t down = next / tiles_across, across = next % tiles_across;
                turn_patch(params, first + i, num_rows, down * kPatchesDown * kPatch + row,
                           across * kPatchesAcross * kPatch + word);
            }
            next -= tiles_down * tiles_across;
        }
    }
}

}  // namespace deepcomm::kernels
