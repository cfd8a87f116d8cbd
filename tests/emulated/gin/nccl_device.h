// SPDX-License-Identifier: Apache-2.0
// What kernels/gin uses of NCCL's device API, over the emulator's rails: puts that read and land as
// late as they like and in any order, a signal behind the puts of its context and peer, and a
// counter once a source has been read. Declared from NCCL's public documentation; none of its code.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device/device.cuh"

#define NCCL_VERSION_CODE 23007

/// Registered memory of all ranks.
struct EmulatedWindow {
    size_t num_bytes;
    unsigned char* bases[8];
};
using ncclWindow_t = EmulatedWindow*;

struct ncclDevComm {
    int rank;
    int num_ranks;
    uint32_t num_signals;
    uint32_t num_counters;
    uint64_t* signals[8];  ///< of each rank
    uint64_t* counters;    ///< of this one
    const void* awaited;   ///< what waits park on instead, for one that somebody else ends; or null
};

struct ncclTeam {
    int num_ranks;
};
inline ncclTeam ncclTeamWorld(const ncclDevComm& comm) { return {comm.num_ranks}; }

struct ncclGin_None {};
struct ncclGin_StrongSignalInc {
    uint32_t signal;
};
struct ncclGin_CounterInc {
    uint32_t counter;
};

class ncclGin {
  public:
    ncclGin(const ncclDevComm& comm, int context) : comm_(comm), context_(context) {}

    template <typename RemoteAction>
    void put(ncclTeam team, int peer, ncclWindow_t to, size_t to_offset, ncclWindow_t from,
             size_t from_offset, size_t num_bytes, RemoteAction action,
             ncclGin_CounterInc counted) const {
        check(peer >= 0 && peer < team.num_ranks && peer != comm_.rank, "a peer that is none");
        check(num_bytes > 0, "an empty put");
        check(to_offset + num_bytes <= to->num_bytes && from_offset + num_bytes <= from->num_bytes,
              "a put that is not inside its windows");
        check(counted.counter < comm_.num_counters, "no such counter");
        deepcomm::emu::rail_put_counted(
            {context_, peer}, to->bases[peer] + to_offset, from->bases[comm_.rank] + from_offset,
            static_cast<uint32_t>(num_bytes), comm_.counters + counted.counter);
        act(peer, action);
    }

    uint64_t readSignal(uint32_t signal) const {
        return deepcomm::device::ld_acquire_sys(own_signal(signal));
    }
    uint64_t readCounter(uint32_t counter) const {
        return deepcomm::device::ld_acquire_sys(own_counter(counter));
    }

    // For pause_on, which hardware does not need.
    const void* signal_word(uint32_t signal) const {
        return comm_.awaited != nullptr ? comm_.awaited : own_signal(signal);
    }
    const void* counter_word(uint32_t counter) const {
        return comm_.awaited != nullptr ? comm_.awaited : own_counter(counter);
    }

  private:
    static void check(bool condition, const char* what) {
        if (!condition) deepcomm::emu::fail("GIN: %s", what);
    }
    const uint64_t* own_signal(uint32_t signal) const {
        check(signal < comm_.num_signals, "no such signal");
        return comm_.signals[comm_.rank] + signal;
    }
    const uint64_t* own_counter(uint32_t counter) const {
        check(counter < comm_.num_counters, "no such counter");
        return comm_.counters + counter;
    }
    void act(int, ncclGin_None) const {}
    void act(int peer, ncclGin_StrongSignalInc inc) const {
        check(inc.signal < comm_.num_signals, "no such signal");
        deepcomm::emu::rail_signal_add_told({context_, peer}, comm_.signals[peer] + inc.signal, 1);
    }

    const ncclDevComm& comm_;
    int context_;
};
