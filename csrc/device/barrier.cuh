// SPDX-License-Identifier: Apache-2.0
// Barriers wider than a block: all blocks of a kernel, and the same block of all ranks. Both are
// bounded waits: false means that somebody did not come, and then nobody may signal any more.
#pragma once

#include "device/group.cuh"
#include "device/wait.cuh"

namespace deepcomm::device {

/// In zeroed device memory; reused by every barrier and kernel without a reset.
struct GridBarrierState {
    uint32_t num_arrived;
    uint32_t generation;
};

/// Meeting of all blocks of the kernel; every thread of each block calls it. The grid must be
/// resident at once. What any thread did before, every thread sees afterwards.
DEEPCOMM_DEVICE bool grid_barrier(const WaitContext& context, const WaitSite& site,
                                  const Block& block, GridBarrierState* state) {
    block.sync();  // ORDER: the block's accesses before its leader's arrival
    bool is_complete = true;
    if (block.is_leader()) {
        // Cannot advance before this block has arrived, so it is the generation to leave.
        const uint32_t generation = ld_relaxed_gpu(&state->generation);
        const auto last = static_cast<uint32_t>(block.num_blocks() - 1);
        // ORDER: releases this block; the last arrival acquires all
        const bool is_last = atom_add_acq_rel_gpu(&state->num_arrived, 1u) == last;
        if (is_last) {
            st_relaxed_gpu(&state->num_arrived, 0);  // published by the next line
            // ORDER: passes on all arrivals; pairs with the acquire below
            st_release_gpu(&state->generation, generation + 1);
        } else {
            // ORDER: pairs with the release by the last arrival
            is_complete =
                wait_reached_acquire_gpu(context, site, &state->generation, generation + 1);
        }
    }
    return block.sync_and(is_complete);  // ORDER: the leader's acquire before the block goes on
}

/// One word a pair of ranks: words[dst][src] is written by src only, in dst's symmetric memory.
struct RankBarrier {
    uint32_t* const* words;  ///< [num_ranks], each [num_ranks]; the table is in kernel arguments
    int32_t num_ranks;
};

/// Meeting of one group on each rank; every thread of the groups calls it with the same epoch, one
/// higher each time (it may wrap). What any rank's group did before, all groups see afterwards.
template <typename Group>
DEEPCOMM_DEVICE bool rank_barrier(const WaitContext& context, const WaitSite& site,
                                  const Group& group, const RankBarrier& barrier, uint32_t epoch) {
    group.sync();  // ORDER: the group's accesses before its signals
    bool is_complete = true;
    for (int32_t peer = group.thread_idx(); peer < barrier.num_ranks; peer += group.size()) {
        // ORDER: releases this rank's group; pairs with the acquire below, on the peer
        st_release_sys(&barrier.words[peer][context.rank], epoch);
    }
    for (int32_t peer = group.thread_idx(); peer < barrier.num_ranks; peer += group.size()) {
        const WaitSite at_peer = {site.operation, site.role, peer, site.slot};
        const uint32_t* word = &barrier.words[context.rank][peer];
        // ORDER: pairs with the release above, on the peer
        is_complete = wait_reached_acquire_sys(context, at_peer, word, epoch) && is_complete;
    }
    return group.sync_and(is_complete);  // ORDER: all acquires before the group goes on
}

}  // namespace deepcomm::device
