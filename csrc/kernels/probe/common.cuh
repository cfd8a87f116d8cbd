// SPDX-License-Identifier: Apache-2.0
// What the probes share: their waits, who moves which tile, and the payload, which encodes (rank,
// round, index).
#pragma once

#include "device/device.cuh"
#include "kernels/probe/params.hpp"

namespace deepcomm::kernels {

DEEPCOMM_DEVICE device::WaitContext wait_context(const ProbeParams& probe) {
    return {probe.record, probe.timeout_ns, probe.rank};
}

DEEPCOMM_DEVICE device::WaitSite wait_for_peer(device::Role role, int32_t peer, int32_t slot) {
    return {device::Operation::kProbe, role, peer, slot};
}

/// The tiles of one worker of several, in the order in which it moves them.
struct TileRange {
    int32_t first;
    int32_t stride;
    int32_t count;

    DEEPCOMM_DEVICE int32_t operator[](int32_t index) const { return first + index * stride; }
};

DEEPCOMM_DEVICE TileRange tiles_of(int32_t num_tiles, int32_t worker, int32_t num_workers) {
    return {worker, num_workers, (num_tiles - worker + num_workers - 1) / num_workers};
}

constexpr uint32_t probe_payload(int32_t rank, uint32_t round, int32_t index) {
    return (static_cast<uint32_t>(rank) << 24) + (round << 12) + static_cast<uint32_t>(index) + 1;
}

/// A fold that depends on the order of its values.
constexpr uint32_t fold(uint32_t so_far, uint32_t value) { return so_far * 31 + value; }

}  // namespace deepcomm::kernels
