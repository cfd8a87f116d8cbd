// SPDX-License-Identifier: Apache-2.0
// Emulated counterpart of cuda/platform.cuh: the language's words as macros on the running fiber.
#pragma once

#include <cstddef>
#include <type_traits>

#include "common/int.hpp"
#include "emu/device_api.hpp"

#define DEEPCOMM_DEVICE inline
#define DEEPCOMM_UNROLL
#define DEEPCOMM_NO_UNROLL
#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(num_bytes) __attribute__((aligned(num_bytes)))
#define threadIdx (::deepcomm::emu::current_identity->thread_idx)
#define blockIdx (::deepcomm::emu::current_identity->block_idx)
#define blockDim (::deepcomm::emu::current_identity->block_dim)
#define gridDim (::deepcomm::emu::current_identity->grid_dim)

namespace deepcomm::device {

constexpr bool kHasBulkCopies = true;
// A failed poll parks until something has changed.
constexpr uint32_t kPollsPerClockRead = 1;
constexpr uint32_t kPollsPerRecordRead = 1;
constexpr int32_t kOptimisticPolls = 1;

struct alignas(16) Vec128 {
    uint32_t words[4];
};

template <typename Smem>
inline Smem& shared_storage() {
    return *static_cast<Smem*>(emu::shared_memory(sizeof(Smem)));
}

inline uint64_t globaltimer_ns() { return emu::globaltimer_ns(); }

inline void pause_on(const void* address, uint64_t deadline_ns, const void* other = nullptr) {
    emu::pause_on(address, deadline_ns, other);
}

// Emulated kernels of a stream run one after the other.
inline void await_kernel_ahead() {}
inline void admit_next_kernel() {}

inline void sleep_ns(uint32_t duration_ns) { emu::sleep_ns(duration_ns); }

[[noreturn]] inline void exit_thread() { emu::exit_thread(); }

}  // namespace deepcomm::device
