// SPDX-License-Identifier: Apache-2.0
// Barriers: in every round each block of each rank folds its number into one word in turn, so that
// any step out of order changes the result. PROTOCOLS.md: probe_barrier_fold.
#pragma once

#include "kernels/probe/common.cuh"

namespace deepcomm::kernels {

/// Meeting of all blocks of all ranks: the blocks of a rank, then their first blocks over ranks,
/// then the blocks again. A single block needs the ranks only.
DEEPCOMM_DEVICE bool meet_everyone(const BarrierFoldParams& params, const device::Block& block,
                                   const device::RankBarrier& ranks, uint32_t epoch) {
    const auto context = wait_context(params.probe);
    const auto site = wait_for_peer(device::Role::kMeet, layout::kNoPeer, layout::kNoSlot);
    if (block.num_blocks() == 1) return device::rank_barrier(context, site, block, ranks, epoch);
    auto* grid = static_cast<device::GridBarrierState*>(params.grid_state);
    // ORDER: this rank's blocks before the other ranks
    if (!device::grid_barrier(context, site, block, grid)) return false;
    bool is_complete = true;
    if (block.block_idx() == 0) {
        // ORDER: what block 0 knows before the other ranks' turns, and theirs before ours
        is_complete = device::rank_barrier(context, site, block, ranks, epoch);
    }
    if (!is_complete) return false;
    return device::grid_barrier(context, site, block, grid);  // ORDER: what block 0 learnt, to all
}

extern "C" __global__ void __launch_bounds__(256)
    probe_barrier_fold(const __grid_constant__ BarrierFoldParams params) {
    const device::Block block;
    const device::RankBarrier ranks = {params.barrier_words, params.num_ranks};
    const int32_t num_turns = params.num_ranks * block.num_blocks();
    const int32_t my_turn = block.block_idx() * params.num_ranks + params.probe.rank;
    uint32_t epoch = 0;
    for (int32_t round = 0; round < params.probe.num_rounds; ++round) {
        for (int32_t turn = 0; turn < num_turns; ++turn) {
            // A thread other than the barriers' leader writes: they must cover the whole block.
            const bool writes = block.thread_idx() == block.size() - 1;
            if (turn == my_turn && writes) {
                *params.accumulator = fold(*params.accumulator, static_cast<uint32_t>(my_turn) + 1);
            }
            if (!meet_everyone(params, block, ranks, ++epoch)) return;
        }
    }
}

}  // namespace deepcomm::kernels
