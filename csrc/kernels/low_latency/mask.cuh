// SPDX-License-Identifier: Apache-2.0
// low_latency_mask: marks a peer dead or alive between operations. PROTOCOLS.md: low_latency_mask.
#pragma once

#include "device/device.cuh"
#include "kernels/low_latency/params.hpp"

namespace deepcomm::kernels {

extern "C" __global__ void __launch_bounds__(32)
    low_latency_mask(const __grid_constant__ LowLatencyMaskParams params) {
    const device::Block block;
    if (block.is_leader()) device::st_relaxed_gpu(&params.rank_mask[params.peer], params.value);
}

}  // namespace deepcomm::kernels
