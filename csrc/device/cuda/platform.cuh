// SPDX-License-Identifier: Apache-2.0
// What the language and the chip give: function markers, shared storage, time, leaving a thread.
#pragma once

#include "common/int.hpp"

#define DEEPCOMM_DEVICE __device__ __forceinline__
/// Before a loop over registers, which must not be indexed at run time.
#define DEEPCOMM_UNROLL _Pragma("unroll")
/// Before a loop of a kernel that runs for microseconds: it then waits for its own instructions, and
/// copies of a body are more of them.
#define DEEPCOMM_NO_UNROLL _Pragma("unroll 1")

namespace deepcomm::device {

/// Bulk copies, transaction barriers and proxies exist from sm_90 on; below, the same names copy
/// synchronously with plain loads and stores.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasBulkCopies = false;
#else
constexpr bool kHasBulkCopies = true;
#endif

/// Reading the clock costs more than a poll, so a wait reads it once in this many polls.
constexpr uint32_t kPollsPerClockRead = 64;

/// Likewise the error record, which is in host memory: some 10 ms of polls apart, so that only
/// waits that are late anyway cross PCIe. PERF(2x H200, 2026-11-22): with a look in 64 polls, 132
/// blocks that wait for the end of a 0.7 ms exchange wait for 2 ms more; 64 blocks for 1.3 ms.
constexpr uint32_t kPollsPerRecordRead = kPollsPerClockRead << 8;

/// Looks at several words at once before each of them is awaited alone: some 100 us.
constexpr int32_t kOptimisticPolls = 128;

/// Sixteen bytes moved at once.
struct alignas(16) Vec128 {
    uint32_t words[4];
};

/// The block's dynamic shared memory as a struct: the only way to it. Launch with sizeof(Smem).
template <typename Smem>
DEEPCOMM_DEVICE Smem& shared_storage() {
    extern __shared__ __align__(1024) unsigned char deepcomm_shared_memory[];
    return *reinterpret_cast<Smem*>(deepcomm_shared_memory);
}

/// Wall clock of the device; its resolution may be as coarse as a microsecond.
DEEPCOMM_DEVICE uint64_t globaltimer_ns() {
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}

/// Tells a simulator that a poll of address has failed. Hardware polls again at once.
DEEPCOMM_DEVICE void pause_on(const void* /*address*/, uint64_t /*deadline_ns*/,
                              const void* /*other*/ = nullptr) {}

/// Ahead of all access to memory in a kernel that may be launched before the one ahead of it on its stream has
/// ended: waits for that one, and for all that it has written. The host launches a kernel so where this comes first.
DEEPCOMM_DEVICE void await_kernel_ahead() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// Lets the next kernel be launched so, once a thread of each block has come here or has ended.
DEEPCOMM_DEVICE void admit_next_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

DEEPCOMM_DEVICE void sleep_ns(uint32_t duration_ns) { __nanosleep(duration_ns); }

/// Ends the calling thread and leaves the context alive, unlike a trap.
DEEPCOMM_DEVICE void exit_thread() { asm volatile("exit;"); }

}  // namespace deepcomm::device
