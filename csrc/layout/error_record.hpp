// SPDX-License-Identifier: Apache-2.0
// What a kernel leaves behind when a wait runs out or a check fails. One record a rank, in memory
// that host and device share; the host turns it into an exception and clears it.
//
//   0       4      8           12     16     20     24     28      32
//   +-------+------+-----------+------+------+------+------+-------+
//   | state | kind | operation | role | rank | peer | slot | block |
//   +-------+------+-----------+------+------+------+------+-------+
//   32         40         48             52     64
//   +----------+----------+--------------+------+
//   | expected | observed | is_condemned | free |
//   +----------+----------+--------------+------+
//
// state goes kClear -> kWriting by compare-and-swap, so that the first failure wins, and kWriting
// -> kComplete by a release after the fields: who acquires kComplete may read them.
#pragma once

#include "common/int.hpp"

namespace deepcomm::layout {

enum class RecordState : uint32_t { kClear = 0, kWriting = 1, kComplete = 2 };

enum class FailureKind : int32_t { kTimeout = 0, kCheck = 1 };

/// The operation of the buffer that a kernel belongs to.
enum class Operation : int32_t {
    kProbe = 0,
    kBarrier = 1,
    kDispatch = 2,
    kCombine = 3,
    kLowLatencyDispatch = 4,
    kLowLatencyCombine = 5,
    kMove = 6,
};

/// The part of the operation that failed.
enum class Role : int32_t {
    kCount = 0,
    kSend = 1,
    kReceive = 2,
    kReduce = 3,
    kForward = 4,
    kMeet = 5
};

constexpr int32_t kNoPeer = -1;

/// What the ranks of an exchange, 0, 1, ..., are called among all ranks.
struct RankNames {
    int32_t first = 0;
    int32_t step = 1;

    constexpr int32_t of(int32_t rank) const {
        return rank == kNoPeer ? kNoPeer : first + rank * step;
    }
};

constexpr int32_t kNoSlot = -1;

struct ErrorRecord {
    uint32_t state;  ///< RecordState; the only field touched by strong operations
    FailureKind kind;
    Operation operation;
    Role role;
    int32_t rank;
    int32_t peer;  ///< or kNoPeer
    int32_t slot;  ///< or kNoSlot
    int32_t block;
    uint64_t expected;
    uint64_t observed;
    uint32_t is_condemned;  ///< by the host, without a record: the buffer can only be closed
    uint32_t free[3];
};

static_assert(sizeof(ErrorRecord) == 64, "drawing above");
#if !defined(__CUDACC_RTC__)  // NVRTC has no offsetof
static_assert(__builtin_offsetof(ErrorRecord, rank) == 16, "drawing above");
static_assert(__builtin_offsetof(ErrorRecord, expected) == 32, "drawing above");
static_assert(__builtin_offsetof(ErrorRecord, observed) == 40, "drawing above");
static_assert(__builtin_offsetof(ErrorRecord, is_condemned) == 48, "drawing above");
#endif

}  // namespace deepcomm::layout
