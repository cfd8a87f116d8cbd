// SPDX-License-Identifier: Apache-2.0
// THE bounded wait. Everything that waits for another thread, copy or rank does it here: with a
// deadline, and with a record of what it waited for when that passes. After false the caller must
// not signal peers any more; it leaves, and so do the other threads of its group (sync_and).
#pragma once

#include "device/primitives.cuh"
#include "layout/error_record.hpp"

namespace deepcomm::device {

using layout::ErrorRecord;
using layout::FailureKind;
using layout::Operation;
using layout::RecordState;
using layout::Role;

/// What all waits of a kernel share.
struct WaitContext {
    ErrorRecord* record;  ///< of this rank; null: tells nobody, and hears of no other failure
    uint64_t timeout_ns;  ///< of each wait, from its first look at the clock
    int32_t rank;
    layout::RankNames names = {};
    uint64_t* failed =
        nullptr;  ///< set with the record, for kernels that are queued already; or null
};

/// Where a wait or check stands; goes into the record as it is.
struct WaitSite {
    Operation operation;
    Role role;
    int32_t peer = layout::kNoPeer;
    int32_t slot = layout::kNoSlot;
};

/// What a poll saw.
struct Observed {
    uint64_t value;
    bool is_ready;
};

/// Whether a monotonic counter has come to expected, also across its wrap: at most 2^31 ahead.
DEEPCOMM_DEVICE bool is_reached(uint32_t observed, uint32_t expected) {
    return static_cast<int32_t>(observed - expected) >= 0;
}

/// Fills the rank's record, the first failure wins; and lets no later operation begin.
DEEPCOMM_DEVICE void record_failure(const WaitContext& context, const WaitSite& site,
                                    FailureKind kind, uint64_t expected, uint64_t observed) {
    ErrorRecord* record = context.record;
    if (context.failed != nullptr) st_relaxed_gpu(context.failed, 1);
    const auto clear = static_cast<uint32_t>(RecordState::kClear);
    const auto writing = static_cast<uint32_t>(RecordState::kWriting);
    if (atom_cas_relaxed_sys(&record->state, clear, writing) != clear) return;
    record->kind = kind;
    record->operation = site.operation;
    record->role = site.role;
    record->rank = context.names.of(context.rank);
    record->peer = context.names.of(site.peer);
    record->slot = site.slot;
    record->block = static_cast<int32_t>(blockIdx.x);
    record->expected = expected;
    record->observed = observed;
    // ORDER: the fields above; pairs with the host's acquire of kComplete
    st_release_sys(&record->state, static_cast<uint32_t>(RecordState::kComplete));
}

/// Polls until poll() is ready; address, and perhaps another one, is what it polls, for the emulator.
/// False when the deadline has passed (and is recorded) or when the rank has failed elsewhere.
template <typename Poll>
DEEPCOMM_DEVICE bool wait_until(const WaitContext& context, const WaitSite& site, uint64_t expected,
                                const void* address, Poll&& poll, const void* other = nullptr) {
    uint64_t deadline_ns = 0;
    for (uint32_t num_polls = 1;; ++num_polls) {
        const Observed observed = poll();
        if (observed.is_ready) return true;
        if (num_polls % kPollsPerClockRead == 0) {
            const uint64_t now_ns = globaltimer_ns();
            if (deadline_ns == 0) deadline_ns = now_ns + context.timeout_ns;
            if (now_ns >= deadline_ns) {
                if (context.record != nullptr) {
                    record_failure(context, site, FailureKind::kTimeout, expected, observed.value);
                }
                return false;
            }
            if (context.record != nullptr && num_polls % kPollsPerRecordRead == 0) {
                const uint32_t state = ld_relaxed_sys(&context.record->state);
                if (state != static_cast<uint32_t>(RecordState::kClear)) return false;
            }
        }
        pause_on(address, deadline_ns, other);
    }
}

// ---- the usual waits: a monotonic word reaches expected

/// ORDER: acquires what the release that brought the word to expected has published, by any rank.
DEEPCOMM_DEVICE bool wait_reached_acquire_sys(const WaitContext& context, const WaitSite& site,
                                              const uint32_t* word, uint32_t expected) {
    return wait_until(context, site, expected, word, [&]() -> Observed {
        const uint32_t value = ld_acquire_sys(word);
        return {value, is_reached(value, expected)};
    });
}

/// ORDER: the same for releases by threads of this rank.
DEEPCOMM_DEVICE bool wait_reached_acquire_gpu(const WaitContext& context, const WaitSite& site,
                                              const uint32_t* word, uint32_t expected) {
    return wait_until(context, site, expected, word, [&]() -> Observed {
        const uint32_t value = ld_acquire_gpu(word);
        return {value, is_reached(value, expected)};
    });
}

/// ORDER: none by itself; a later fence_acq_rel acquires.
DEEPCOMM_DEVICE bool wait_reached_relaxed_sys(const WaitContext& context, const WaitSite& site,
                                              const uint32_t* word, uint32_t expected) {
    return wait_until(context, site, expected, word, [&]() -> Observed {
        const uint32_t value = ld_relaxed_sys(word);
        return {value, is_reached(value, expected)};
    });
}

/// ORDER: acquires the arrivals and copies of the mbarrier's phase of that parity.
DEEPCOMM_DEVICE bool wait_mbarrier(const WaitContext& context, const WaitSite& site,
                                   Mbarrier* mbarrier, uint32_t parity) {
    return wait_until(context, site, parity, mbarrier, [&]() -> Observed {
        return {parity ^ 1, mbarrier_try_wait(mbarrier, parity)};
    });
}

}  // namespace deepcomm::device
