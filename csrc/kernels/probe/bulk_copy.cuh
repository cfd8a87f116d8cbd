// SPDX-License-Identifier: Apache-2.0
// Bulk copies at full speed: one thread of each warp moves tiles through stages of its own, global
// -> shared -> peer, and loads ahead of its stores. PROTOCOLS.md: probe_bulk_copy.
#pragma once

#include "kernels/probe/common.cuh"

namespace deepcomm::kernels {

constexpr int32_t kCopyWarps = 16;
constexpr int32_t kCopyStages = 4;
constexpr int32_t kCopyTileBytes = 2048;
/// Loads issued before the tile that is stored; the other stages belong to stores in flight.
constexpr int32_t kLoadsAhead = 2;
constexpr int32_t kMaxUnread = kCopyStages - kLoadsAhead;

struct BulkCopyShared {
    alignas(128) unsigned char tiles[kCopyWarps][kCopyStages][kCopyTileBytes];
    device::Mbarrier full[kCopyWarps][kCopyStages];
};

/// What one warp has of it.
struct CopyStages {
    unsigned char (*tiles)[kCopyTileBytes];
    device::Mbarrier* full;
};

DEEPCOMM_DEVICE void load_copy_tile(const BulkCopyParams& params, const CopyStages& stages,
                                    const TileRange& tiles, int32_t index) {
    if (index >= tiles.count) return;
    const int32_t stage = index % kCopyStages;
    const auto num_bytes = static_cast<uint32_t>(params.tile_bytes);
    const int64_t offset = static_cast<int64_t>(tiles[index]) * params.tile_bytes;
    device::bulk_load(stages.tiles[stage], params.src + offset, num_bytes, &stages.full[stage]);
    device::mbarrier_arrive_expect_tx(&stages.full[stage], num_bytes);
}

/// Moves the tiles; true once all have landed.
DEEPCOMM_DEVICE bool copy_tiles(const BulkCopyParams& params, const CopyStages& stages,
                                const TileRange& tiles) {
    const auto context = wait_context(params.probe);
    const auto num_bytes = static_cast<uint32_t>(params.tile_bytes);
    bool is_complete = true;
    for (int32_t index = 0; index < kLoadsAhead; ++index) {
        load_copy_tile(params, stages, tiles, index);
    }
    for (int32_t index = 0; index < tiles.count; ++index) {
        const int32_t stage = index % kCopyStages;
        const auto parity = static_cast<uint32_t>(index / kCopyStages & 1);
        const auto site = wait_for_peer(device::Role::kSend, params.probe.dst_rank, tiles[index]);
        // ORDER: acquires the load of this stage
        is_complete = device::wait_mbarrier(context, site, &stages.full[stage], parity);
        if (!is_complete) break;
        const int64_t offset = static_cast<int64_t>(tiles[index]) * params.tile_bytes;
        device::bulk_store(params.dst + offset, stages.tiles[stage], num_bytes);
        device::bulk_commit_group();
        // ORDER: the older store from the stage that is loaded next has read it
        device::bulk_wait_group_read<kMaxUnread>();
        load_copy_tile(params, stages, tiles, index + kLoadsAhead);
    }
    device::bulk_wait_group<0>();  // ORDER: the stores have landed before the caller's release
    return is_complete;
}

/// By one thread of the warp, which needs nobody to see its mbarriers but the copies.
DEEPCOMM_DEVICE bool send_copy(const BulkCopyParams& params, const CopyStages& stages,
                               const TileRange& tiles) {
    for (int32_t stage = 0; stage < kCopyStages; ++stage) {
        device::mbarrier_init(&stages.full[stage], 1);
    }
    device::fence_mbarrier_init();  // ORDER: the initialisation before copies complete on it
    if (!copy_tiles(params, stages, tiles)) return false;
    // ORDER: pairs with the wait in receive_copy
    device::red_add_release_sys(params.dst_signal, static_cast<uint32_t>(tiles.count));
    return true;
}

DEEPCOMM_DEVICE void receive_copy(const BulkCopyParams& params, const device::Block& block,
                                  bool is_sent) {
    const auto site = wait_for_peer(device::Role::kReceive, params.probe.src_rank, layout::kNoSlot);
    bool has_arrived = true;
    if (block.is_leader()) {
        // ORDER: pairs with the releases in send_copy, of all warps of the peer
        has_arrived = device::wait_reached_acquire_sys(wait_context(params.probe), site,
                                                       params.signal, params.expected_signal);
    }
    // ORDER: the leader's acquire before the reads
    if (!block.sync_and(is_sent && has_arrived)) return;
    if (params.copy == nullptr) return;
    const int32_t num_words = params.num_tiles * (params.tile_bytes / 4);
    const int32_t first = block.block_idx() * block.size() + block.thread_idx();
    for (int32_t i = first; i < num_words; i += block.size() * block.num_blocks()) {
        params.copy[i] = params.received[i];
    }
}

extern "C" __global__ void __launch_bounds__(kCopyWarps* device::kWarpSize)
    probe_bulk_copy(const __grid_constant__ BulkCopyParams params) {
    auto& smem = device::shared_storage<BulkCopyShared>();
    const device::Block block;
    const device::Warp warp;
    const int32_t warps_per_block = block.size() / device::kWarpSize;
    const int32_t worker = block.block_idx() * warps_per_block + warp.warp_idx();
    const CopyStages stages = {smem.tiles[warp.warp_idx()], smem.full[warp.warp_idx()]};
    const TileRange tiles =
        tiles_of(params.num_tiles, worker, block.num_blocks() * warps_per_block);
    const bool is_sent = !warp.is_leader() || send_copy(params, stages, tiles);
    receive_copy(params, block, is_sent);
}

}  // namespace deepcomm::kernels
