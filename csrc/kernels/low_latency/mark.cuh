// SPDX-License-Identifier: Apache-2.0
// low_latency_mark: tells the host how far the stream of a network has come. PROTOCOLS.md: low latency
// over carried rails.
#pragma once

#include "device/device.cuh"
#include "kernels/low_latency/params.hpp"

namespace deepcomm::kernels {

extern "C" __global__ void __launch_bounds__(32)
    low_latency_mark(const __grid_constant__ LowLatencyMarkParams params) {
    const device::Block block;
    if (block.is_leader()) device::st_relaxed_sys(params.word, params.value);
}

}  // namespace deepcomm::kernels
