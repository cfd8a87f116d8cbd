// SPDX-License-Identifier: Apache-2.0
// What a rank tells all others when it enters a high-throughput operation, and what it tells the
// host of what it heard.
//
//   packet 0: signature | capacity  | num_tokens | epoch
//   packet 1: landing   | alignment | refusal    | epoch
#pragma once

#include "kernels/params.hpp"
#include "layout/exchange.hpp"

namespace deepcomm::kernels {

constexpr int32_t kNoCapacity = -1;

/// Why a rank refuses, as bits of Header::refusal.
constexpr uint32_t kRefusedByHost = 1;     ///< the host has found an argument error
constexpr uint32_t kExpertOutOfRange = 2;  ///< an id is below -1, or E or more
constexpr uint32_t kExpertTwice = 4;       ///< a row names an expert twice
constexpr uint32_t kUnraisedTrouble = 8;   ///< the host has yet to raise an earlier operation's
constexpr uint32_t kUnmadeHandle = 16;     ///< the handle's dispatch did not take place
/// The operation has already come to nothing one stage before: MeetStatus and culprit follow.
constexpr uint32_t kFailedBefore = 32;
constexpr uint32_t kReasons = kFailedBefore - 1;  ///< all bits that stand for a refusal
constexpr int32_t kStatusShift = 6;
constexpr uint32_t kStatusMask = 3;
constexpr int32_t kCulpritShift = 16;

/// Bits of Header::landing beside the generation's index.
constexpr uint32_t kLandingIdsAre64 = 1u << 31;
constexpr uint32_t kLandingIndexMask = 0xFFFF;

struct Header {
    uint32_t signature;  ///< what all ranks must ask for alike; opaque here
    int32_t capacity;    ///< rows that fit, or kNoCapacity
    int32_t num_tokens;
    uint32_t landing;  ///< generation of the ring that peers shall write to, and kLanding bits
    int32_t alignment;
    uint32_t refusal;  ///< 0: takes part
};

/// Of several that are not good the smallest holds, on all ranks: nobody grows while others do not.
enum class MeetStatus : uint32_t {
    kGood = 0,
    kRefused = 1,
    kMismatch = 2,
    kMustGrow = 3,  ///< a rank brings more tokens than there is room for
};

/// An operation that did not take place, in memory shared with the host: the first one, until the
/// host clears it.
struct Trouble {
    uint32_t state;  ///< layout::RecordState
    MeetStatus status;
    int32_t culprit;  ///< the rank that refuses or differs, among all ranks
    int32_t max_tokens;
    Header mine;
    Header theirs;
};

/// What an operation came to, for the kernels after it on the same rank; in device memory.
struct Verdict {
    uint32_t met_epoch;   ///< the latest one whose meeting's kernel has ended well, or kNotMet
    uint32_t done_epoch;  ///< the latest one that has ended well, or was called off
    MeetStatus status;
    int32_t culprit;  ///< among all ranks, or kNoPeer
    int32_t most_tokens;
    Header mine;
    Header theirs;  ///< the culprit's
};

constexpr uint32_t kNotMet = 0xFFFFFFFF;

/// Words that every operation adds to; 64 bits each.
struct Counters {
    uint64_t bytes_local;  ///< rows and scales that this rank wrote for itself
    uint64_t bytes_node;   ///< likewise for peers
    uint64_t tokens_received;
    uint64_t free;
};

struct MeetParams {
    CommParams comm;
    layout::ExchangeLayout layout;
    layout::RowAreas there;  ///< rows in the peers' memory: as here, but for mirrors
    int32_t is_carried;      ///< the peers' memory is mirrors
    Header header;
    int32_t max_tokens;
    int32_t host_waits;  ///< whether the host waits for this operation's verdict, on all ranks
    int32_t reports;     ///< whether the host hears from this stage of an operation called off
    void* epoch;         ///< device::EpochState, one for all high-throughput operations
    Verdict* verdict;
    const Verdict* verdict_before;  ///< of the stage before, which must have ended; or null
    Trouble* trouble;
    uint64_t* has_trouble;  ///< 0 spares a look at the Trouble, which is far away
    uint32_t* taken;     ///< [3]: work that warps have taken (rows/work.cuh), 0 before they begin
    Counters* counters;  ///< followed by [R]: ns until each rank's header came, of the first block
};

}  // namespace deepcomm::kernels
