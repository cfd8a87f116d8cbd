// SPDX-License-Identifier: Apache-2.0
// Bulk copies between global and shared memory, their mbarriers, groups and proxy fences. Sizes
// and addresses are multiples of 16. One elected thread calls, commits and waits for its groups.
//
// Below sm_90 copies are synchronous and done by the calling thread, and mbarriers count arrivals
// only. That is why the device layer issues copies before the arrival that expects their bytes.
#pragma once

#include "device/cuda/platform.cuh"

namespace deepcomm::device {

/// Lives in shared memory. Phases alternate parity 0, 1, 0, ...
struct alignas(8) Mbarrier {
    uint64_t bits;
};

DEEPCOMM_DEVICE uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

DEEPCOMM_DEVICE void mbarrier_init(Mbarrier* mbarrier, uint32_t num_arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(mbarrier)),
                 "r"(num_arrivals)
                 : "memory");
}

/// ORDER: makes this thread's mbarrier_init visible to copies that complete on it; a block barrier
/// still has to make it visible to the block's other threads.
DEEPCOMM_DEVICE void fence_mbarrier_init() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

/// ORDER: releases to whoever sees the phase complete.
DEEPCOMM_DEVICE void mbarrier_arrive(Mbarrier* mbarrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(mbarrier)) : "memory");
}

/// Arrives, and lets the phase also wait for num_bytes of copies issued before.
DEEPCOMM_DEVICE void mbarrier_arrive_expect_tx(Mbarrier* mbarrier, uint32_t num_bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(mbarrier)),
        "r"(num_bytes)
        : "memory");
#else
    mbarrier_arrive(mbarrier);
#endif
}

/// ORDER: true acquires the arrivals and the copies of the phase of that parity.
DEEPCOMM_DEVICE bool mbarrier_try_wait(Mbarrier* mbarrier, uint32_t parity) {
    uint32_t is_complete;
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{.reg .pred complete;\n"
        " mbarrier.try_wait.parity.shared.b64 complete, [%1], %2;\n"
        " selp.u32 %0, 1, 0, complete;}"
        : "=r"(is_complete)
        : "r"(shared_address(mbarrier)), "r"(parity)
        : "memory");
#else
    asm volatile(
        "{.reg .pred complete;\n"
        " mbarrier.test_wait.parity.shared.b64 complete, [%1], %2;\n"
        " selp.u32 %0, 1, 0, complete;}"
        : "=r"(is_complete)
        : "r"(shared_address(mbarrier)), "r"(parity)
        : "memory");
#endif
    return is_complete != 0;
}

/// ORDER: generic writes before it, by this thread or known to it, are seen by later bulk copies.
DEEPCOMM_DEVICE void fence_proxy_async() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async;" ::: "memory");
#endif
}

#if __CUDA_ARCH__ < 900
DEEPCOMM_DEVICE void copy_synchronously(void* dst, const void* src, uint32_t num_bytes) {
    Vec128* to = static_cast<Vec128*>(dst);
    const Vec128* from = static_cast<const Vec128*>(src);
    for (uint32_t i = 0; i < num_bytes / sizeof(Vec128); ++i) to[i] = from[i];
}
#endif

/// Global (own or peer) to shared; completes on the mbarrier.
DEEPCOMM_DEVICE void bulk_load(void* shared_dst, const void* global_src, uint32_t num_bytes,
                               Mbarrier* mbarrier) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(shared_address(shared_dst)),
        "l"(global_src), "r"(num_bytes), "r"(shared_address(mbarrier))
        : "memory");
#else
    copy_synchronously(shared_dst, global_src, num_bytes);
#endif
}

/// Shared to global, own or peer; belongs to the thread's open group.
DEEPCOMM_DEVICE void bulk_store(void* global_dst, const void* shared_src, uint32_t num_bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global_dst),
                 "r"(shared_address(shared_src)), "r"(num_bytes)
                 : "memory");
#else
    copy_synchronously(global_dst, shared_src, num_bytes);
#endif
}

DEEPCOMM_DEVICE void bulk_commit_group() {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

/// ORDER: all but the newest kMaxPending groups are written and visible to this thread, which may
/// then release them to others.
template <int kMaxPending>
DEEPCOMM_DEVICE void bulk_wait_group() {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kMaxPending) : "memory");
#endif
}

/// ORDER: all but the newest kMaxPending groups have read their shared memory, which may be reused.
template <int kMaxPending>
DEEPCOMM_DEVICE void bulk_wait_group_read() {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kMaxPending) : "memory");
#endif
}

}  // namespace deepcomm::device
