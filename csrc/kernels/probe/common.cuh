// SPDX-License-Identifier: Apache-2.0
// What the probes share: their waits and the payload, which encodes (rank, round, index).
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

constexpr uint32_t probe_payload(int32_t rank, uint32_t round, int32_t index) {
    return (static_cast<uint32_t>(rank) << 24) + (round << 12) + static_cast<uint32_t>(index) + 1;
}

/// A fold that depends on the order of its values.
constexpr uint32_t fold(uint32_t so_far, uint32_t value) { return so_far * 31 + value; }

}  // namespace deepcomm::kernels
