// SPDX-License-Identifier: Apache-2.0
// The one place that names NCCL's device API: what the rail agent needs of it. Compiled against the
// headers of exactly the library that is loaded; tests compile it against emulated ones.
#pragma once

#include <nccl_device.h>

#include "device/device.cuh"

namespace deepcomm::kernels {

/// A context of a device communicator, used by one thread a peer. Signals are words of the peer that
/// only grow, counters words of this rank.
class GinContext {
  public:
    DEEPCOMM_DEVICE explicit GinContext(const void* dev_comm)
        : comm_(*static_cast<const ncclDevComm*>(dev_comm)), gin_(comm_, 0) {}

    /// What one put copies.
    struct Copy {
        const void* to_window;
        int64_t to_offset;
        const void* from_window;
        int64_t from_offset;
        int64_t num_bytes;
    };

    /// Copies to the peer; the counter grows by one once the source may be reused.
    DEEPCOMM_DEVICE void put(int32_t peer, const Copy& copy, uint32_t counter) const {
        put(peer, copy, counter, ncclGin_None{});
    }
    /// The same; then the peer's signal grows by one.
    /// ORDER: after this put and all earlier ones to the peer; pairs with its acquire of the signal.
    DEEPCOMM_DEVICE void put_and_signal(int32_t peer, const Copy& copy, uint32_t counter,
                                        uint32_t signal) const {
#if NCCL_VERSION_CODE >= 23007
        put(peer, copy, counter, ncclGin_StrongSignalInc{signal});
#else
        put(peer, copy, counter, ncclGin_SignalInc{signal});
#endif
    }
    /// ORDER: acquires what the put that raised the signal, and earlier ones of its peer, have written.
    DEEPCOMM_DEVICE uint64_t signal(uint32_t signal) const { return gin_.readSignal(signal); }
    /// ORDER: acquires the ends of the reads of sources that the counter counts.
    DEEPCOMM_DEVICE uint64_t counter(uint32_t counter) const { return gin_.readCounter(counter); }

    /// What those two read, for a simulator, whose NCCL tells; hardware polls again at once.
    DEEPCOMM_DEVICE const void* polled_signal([[maybe_unused]] uint32_t signal) const {
#if defined(__CUDACC__)
        return nullptr;
#else
        return gin_.signal_word(signal);
#endif
    }
    DEEPCOMM_DEVICE const void* polled_counter([[maybe_unused]] uint32_t counter) const {
#if defined(__CUDACC__)
        return nullptr;
#else
        return gin_.counter_word(counter);
#endif
    }

  private:
    template <typename RemoteAction>
    DEEPCOMM_DEVICE void put(int32_t peer, const Copy& copy, uint32_t counter,
                             RemoteAction action) const {
        gin_.put(ncclTeamWorld(comm_), peer, window(copy.to_window),
                 static_cast<size_t>(copy.to_offset), window(copy.from_window),
                 static_cast<size_t>(copy.from_offset), static_cast<size_t>(copy.num_bytes), action,
                 ncclGin_CounterInc{counter});
    }
    static DEEPCOMM_DEVICE ncclWindow_t window(const void* handle) {
        return static_cast<ncclWindow_t>(const_cast<void*>(handle));
    }

    const ncclDevComm& comm_;
    ncclGin gin_;
};

}  // namespace deepcomm::kernels
