// SPDX-License-Identifier: Apache-2.0
// How a stream of the emulator waits for another one: a kernel at the end of the work so far counts up,
// and one on the other stream waits for it.
#pragma once

#include "device/device.cuh"
#include "kernels/params.hpp"

namespace deepcomm::kernels {

struct StreamParams {
    CommParams comm;  ///< patience is more than any test's
    uint64_t* word;
    uint64_t value;
    uint64_t* broken;  ///< set where the wait did not end: nothing behind it would ever run
};

extern "C" __global__ void __launch_bounds__(32)
    stream_signal(const __grid_constant__ StreamParams params) {
    const device::Block block;
    if (block.is_leader()) device::st_release_sys(params.word, params.value);
}

extern "C" __global__ void __launch_bounds__(32)
    stream_wait(const __grid_constant__ StreamParams params) {
    const device::Block block;
    if (!block.is_leader()) return;
    const device::WaitContext context = {nullptr, params.comm.timeout_ns, params.comm.rank};
    const device::WaitSite site = {device::Operation::kProbe, device::Role::kReceive,
                                   params.comm.rank};
    const bool has_come =
        device::wait_until(context, site, params.value, params.word, [&]() -> device::Observed {
            const uint64_t value = device::ld_acquire_sys(params.word);
            return {value, value >= params.value};
        });
    if (!has_come) device::st_relaxed_sys(params.broken, uint64_t{1});
}

}  // namespace deepcomm::kernels
