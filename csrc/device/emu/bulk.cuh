// SPDX-License-Identifier: Apache-2.0
// Emulated counterpart of cuda/bulk.cuh.
#pragma once

#include "device/emu/platform.cuh"

namespace deepcomm::device {

struct alignas(8) Mbarrier {
    uint64_t bits;
};

inline void mbarrier_init(Mbarrier* mbarrier, uint32_t num_arrivals) {
    emu::mbarrier_init(mbarrier, num_arrivals);
}

inline void fence_mbarrier_init() { emu::fence_mbarrier_init(); }

inline void mbarrier_arrive(Mbarrier* mbarrier) { emu::mbarrier_arrive(mbarrier, 0); }

inline void mbarrier_arrive_expect_tx(Mbarrier* mbarrier, uint32_t num_bytes) {
    emu::mbarrier_arrive(mbarrier, num_bytes);
}

inline bool mbarrier_try_wait(Mbarrier* mbarrier, uint32_t parity) {
    return emu::mbarrier_try_wait(mbarrier, parity);
}

inline void fence_proxy_async() { emu::fence_proxy_async(); }

inline void bulk_load(void* shared_dst, const void* global_src, uint32_t num_bytes,
                      Mbarrier* mbarrier) {
    emu::bulk_load(shared_dst, global_src, num_bytes, mbarrier);
}

inline void bulk_store(void* global_dst, const void* shared_src, uint32_t num_bytes) {
    emu::bulk_store(global_dst, shared_src, num_bytes);
}

inline void bulk_commit_group() { emu::bulk_commit(); }

template <int kMaxPending>
inline void bulk_wait_group() {
    emu::bulk_wait(kMaxPending, false);
}

template <int kMaxPending>
inline void bulk_wait_group_read() {
    emu::bulk_wait(kMaxPending, true);
}

}  // namespace deepcomm::device
