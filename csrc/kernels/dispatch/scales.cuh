// SPDX-License-Identifier: Apache-2.0
// dispatch_scales: turns the scales of the expert layouts from rows, as they arrive, to the columns
// that grouped GEMMs take. Written a row at a time, columns would cost a sector a word.
#pragma once

#include "device/device.cuh"
#include "kernels/dispatch/params.hpp"

namespace deepcomm::kernels {

constexpr int32_t kScaleThreads = 512;
constexpr int32_t kTurnTile = device::kWarpSize;

struct ScaleShared {
    uint32_t tile[kTurnTile][kTurnTile + 1];
};

/// One tile of a block of rows: rows [row, row + 32), words [word, word + 32).
DEEPCOMM_DEVICE void turn_tile(const ScaleParams& params, int64_t block_idx, int32_t row,
                               int32_t word) {
    ScaleShared& smem = device::shared_storage<ScaleShared>();
    const device::Block block;
    const device::Warp warp;
    const int32_t lane = warp.thread_idx(), num_warps = block.size() / warp.size();
    for (int32_t i = warp.warp_idx(); i < kTurnTile; i += num_warps) {
        if (row + i >= params.block_rows || word + lane >= params.scale_words) continue;
        const int64_t from = block_idx * params.block_rows + row + i;
        smem.tile[i][lane] = params.rows[from * params.scale_words + word + lane];
    }
    block.sync();  // ORDER: the tile before its columns are read
    for (int32_t i = warp.warp_idx(); i < kTurnTile; i += num_warps) {
        if (word + i >= params.scale_words || row + lane >= params.block_rows) continue;
        const int64_t column = block_idx * params.scale_words + word + i;
        params.columns[column * params.column_words + row + lane] = smem.tile[lane][i];
    }
    block.sync();  // ORDER: the tile is read before the next one replaces it
}

extern "C" __global__ void __launch_bounds__(kScaleThreads)
    dispatch_scales(const __grid_constant__ ScaleParams params) {
    const device::Block block;
    const auto row_tiles = static_cast<int32_t>(ceil_div(params.block_rows, kTurnTile));
    const auto word_tiles = static_cast<int32_t>(ceil_div(params.scale_words, kTurnTile));
    const int64_t num_blocks = params.block_rows == 0 ? 0 : params.num_rows / params.block_rows;
    const int64_t num_tiles = num_blocks * row_tiles * word_tiles;
    for (int64_t tile = block.block_idx(); tile < num_tiles; tile += block.num_blocks()) {
        const auto in_block = static_cast<int32_t>(tile % (row_tiles * word_tiles));
        turn_tile(params, tile / (row_tiles * word_tiles), in_block / word_tiles * kTurnTile,
                  in_block % word_tiles * kTurnTile);
    }
}

}  // namespace deepcomm::kernels
