// SPDX-License-Identifier: Apache-2.0
// The number of the current round, kept in device memory so that a replayed graph counts on. It is
// constant while a kernel runs: all blocks read it, and the last one to finish advances it.
#pragma once

#include "device/wait.cuh"

namespace deepcomm::device {

/// In zeroed device memory; wraps after 2^32 rounds, so compare with is_reached.
struct EpochState {
    uint32_t epoch;
    uint32_t num_finished;  ///< blocks of the running kernel
};

/// Round that the running kernel belongs to: 1 in the first.
DEEPCOMM_DEVICE uint32_t current_epoch(const EpochState* state) { return state->epoch + 1; }

/// Called by one thread of each block once its block has read the epoch for the last time. True in
/// the last one, after all others.
DEEPCOMM_DEVICE bool finish_epoch(EpochState* state, int32_t num_blocks) {
    const auto last = static_cast<uint32_t>(num_blocks - 1);
    // ORDER: releases this block's reads of the epoch; the last block acquires all
    const bool is_last = atom_add_acq_rel_gpu(&state->num_finished, 1u) == last;
    if (!is_last) return false;
    st_relaxed_gpu(&state->num_finished, 0);  // the next kernel starts after this one
    state->epoch += 1;
    return true;
}

}  // namespace deepcomm::device
