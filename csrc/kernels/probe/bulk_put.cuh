// SPDX-License-Identifier: Apache-2.0
// Bulk copies: tiles are loaded into a ring of shared-memory stages, changed there by all threads,
// stored to the peer and signalled once they have landed. PROTOCOLS.md: probe_bulk_put.
#pragma once

#include "kernels/probe/common.cuh"

namespace deepcomm::kernels {

constexpr int32_t kTileWords = 64;
constexpr int32_t kTileBytes = kTileWords * 4;
constexpr int32_t kNumStages = 2;

struct BulkPutShared {
    alignas(128) uint32_t tiles[kNumStages][kTileWords];
    device::Mbarrier full[kNumStages];
};

DEEPCOMM_DEVICE void load_tile(const BulkPutParams& params, BulkPutShared& smem,
                               const TileRange& tiles, int32_t index) {
    const int32_t stage = index % kNumStages;
    device::bulk_load(smem.tiles[stage], params.src + tiles[index] * kTileWords, kTileBytes,
                      &smem.full[stage]);
    device::mbarrier_arrive_expect_tx(&smem.full[stage], kTileBytes);
}

/// Changes the tile in shared memory, which the store must see.
DEEPCOMM_DEVICE void change_tile(uint32_t* tile, const device::Block& block) {
    for (int32_t i = block.thread_idx(); i < kTileWords; i += block.size()) tile[i] += 7;
}

DEEPCOMM_DEVICE bool send_tiles(const BulkPutParams& params, BulkPutShared& smem,
                                const device::Block& block, const TileRange& tiles) {
    const auto context = wait_context(params.probe);
    if (block.is_leader() && tiles.count > 0) load_tile(params, smem, tiles, 0);
    for (int32_t index = 0; index < tiles.count; ++index) {
        const int32_t stage = index % kNumStages;
        const auto parity = static_cast<uint32_t>(index / kNumStages & 1);
        const auto site = wait_for_peer(device::Role::kSend, params.probe.dst_rank, tiles[index]);
        // ORDER: acquires the load of this stage
        const bool is_full = device::wait_mbarrier(context, site, &smem.full[stage], parity);
        if (!is_full) return false;
        change_tile(smem.tiles[stage], block);
        device::fence_proxy_async();  // ORDER: this thread's writes before the store reads them
        block.sync();                 // ORDER: all threads' writes before the leader's store
        if (!block.is_leader()) continue;
        device::bulk_store(params.dst + tiles[index] * kTileWords, smem.tiles[stage], kTileBytes);
        device::bulk_commit_group();
        if (index + 1 == tiles.count) continue;
        // ORDER: the store from the next stage, one older, before the load that overwrites it
        device::bulk_wait_group_read<1>();
        load_tile(params, smem, tiles, index + 1);
    }
    return true;
}

/// Signals the tiles of this block, once all have landed.
DEEPCOMM_DEVICE void publish_tiles(const BulkPutParams& params, const device::Block& block,
                                   const TileRange& tiles) {
    if (!block.is_leader()) return;
    device::bulk_wait_group<0>();  // ORDER: the stores have landed before the release
    // ORDER: pairs with the wait in receive_tiles
    device::red_add_release_sys(params.dst_signal, static_cast<uint32_t>(tiles.count));
}

DEEPCOMM_DEVICE bool receive_tiles(const BulkPutParams& params, const device::Block& block,
                                   const TileRange& tiles) {
    const auto site = wait_for_peer(device::Role::kReceive, params.probe.src_rank, layout::kNoSlot);
    bool has_arrived = true;
    if (block.is_leader()) {
        // ORDER: pairs with the releases in publish_tiles, of all blocks of the peer
        has_arrived =
            device::wait_reached_acquire_sys(wait_context(params.probe), site, params.signal,
                                             static_cast<uint32_t>(params.num_tiles));
    }
    if (!block.sync_and(has_arrived)) return false;  // ORDER: the leader's acquire before the reads
    for (int32_t index = 0; index < tiles.count; ++index) {
        const int32_t base = tiles[index] * kTileWords;
        for (int32_t i = block.thread_idx(); i < kTileWords; i += block.size()) {
            params.copy[base + i] = params.received[base + i];
        }
    }
    return true;
}

extern "C" __global__ void __launch_bounds__(256)
    probe_bulk_put(const __grid_constant__ BulkPutParams params) {
    auto& smem = device::shared_storage<BulkPutShared>();
    const device::Block block;
    if (block.is_leader()) {
        for (int32_t stage = 0; stage < kNumStages; ++stage) {
            device::mbarrier_init(&smem.full[stage], 1);
        }
        device::fence_mbarrier_init();  // ORDER: the initialisation before copies complete on it
    }
    block.sync();  // ORDER: the initialisation before other threads wait on it
    const TileRange tiles = tiles_of(params.num_tiles, block.block_idx(), block.num_blocks());
    if (!send_tiles(params, smem, block, tiles)) return;
    publish_tiles(params, block, tiles);
    receive_tiles(params, block, tiles);
}

}  // namespace deepcomm::kernels
