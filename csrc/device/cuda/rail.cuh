// SPDX-License-Identifier: Apache-2.0
// Rails: one-sided copies to the rank of the same local index on another node, and signals behind
// them. Here for rails whose peers are mapped memory; all lanes of a warp call together.
#pragma once

#include "device/cuda/collective.cuh"
#include "device/cuda/memory.cuh"

namespace deepcomm::device {

/// A signal follows the puts of its context to its peer that happen before it, and nothing else is
/// ordered. A context belongs to one warp at a time.
struct RailPeer {
    int32_t context;
    int32_t rank;
};

/// Copies to the peer's memory; a multiple of 16 bytes, both aligned to 16. The source must not
/// change before a flush.
DEEPCOMM_DEVICE void rail_put(RailPeer /*peer*/, void* dst, const void* src, uint32_t num_bytes) {
    warp_sync();  // ORDER: what other lanes have written to the source before it is read
    auto* to = static_cast<Vec128*>(dst);
    const auto* from = static_cast<const Vec128*>(src);
    for (uint32_t i = threadIdx.x % 32; i < num_bytes / sizeof(Vec128); i += 32) {
        st_weak_streaming(to + i, from[i]);
    }
}

/// Adds to a word of the peer. Whoever acquires the sum has what the puts before it have written.
DEEPCOMM_DEVICE void rail_signal_add(RailPeer /*peer*/, uint64_t* word, uint64_t value) {
    warp_sync();  // ORDER: the stores of all lanes before the first lane's release
    // ORDER: pairs with the acquire of whoever waits for the word
    if (threadIdx.x % 32 == 0) red_add_release_sys(word, value);
}

/// Waits until the context's puts no longer need their sources.
DEEPCOMM_DEVICE void rail_flush(int32_t /*context*/) {
    warp_sync();  // ORDER: the reads of all lanes before who writes to the sources
}

}  // namespace deepcomm::device
