// SPDX-License-Identifier: Apache-2.0
// Emulated counterpart of cuda/rail.cuh: puts that complete late and in any order, as a network's.
#pragma once

#include "device/emu/collective.cuh"

namespace deepcomm::device {

struct RailPeer {
    int32_t context;
    int32_t rank;
};

inline void rail_put(RailPeer peer, void* dst, const void* src, uint32_t num_bytes) {
    warp_sync();
    if (threadIdx.x % 32 == 0) emu::rail_put({peer.context, peer.rank}, dst, src, num_bytes);
}

inline void rail_signal_add(RailPeer peer, uint64_t* word, uint64_t value) {
    warp_sync();
    if (threadIdx.x % 32 == 0) emu::rail_signal_add({peer.context, peer.rank}, word, value);
}

inline void rail_flush(int32_t context) {
    if (threadIdx.x % 32 == 0) emu::rail_flush(context);
    warp_sync();
}

}  // namespace deepcomm::device
