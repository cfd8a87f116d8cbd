// SPDX-License-Identifier: Apache-2.0
// Control words in a shared segment: what ranks of a node tell each other. Payload layout is in
// layout/segment.hpp. Every word below has one writer unless its comment says otherwise.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

#include "common/types.hpp"
#include "layout/segment.hpp"

namespace deepcomm::cpu {

enum class PeerState : uint32_t { kAlive = 0, kClosed = 1, kFailed = 2 };

constexpr int32_t kMaxSlots = 64;
constexpr int32_t kMessageBytes = 320;

/// Page 0 of a segment; written by its owner, except doorbell (any peer) and num_waiters (owner).
struct Control {
    alignas(64) std::atomic<uint32_t> doorbell;     ///< bumped by whoever changed what owner awaits
    alignas(64) std::atomic<uint32_t> num_waiters;  ///< owner's threads asleep on doorbell
    alignas(
        64) std::atomic<uint64_t> progress;  ///< last epoch whose peers' memory owner is done with
    alignas(64) std::atomic<PeerState> state;
    int32_t culprit;
    char message[kMessageBytes];
    /// Steps of the combine ring, as ring_step(epoch, step): rows owner has staged, and blocks of its
    /// peers it is done with.
    alignas(64) std::atomic<uint64_t> staged;
    alignas(64) std::atomic<uint64_t> consumed;
    alignas(64) std::atomic<uint64_t> block_stride;  ///< record size the low-latency slots hold
    alignas(64) std::atomic<uint64_t> slot_done[kMaxSlots];  ///< last finished low-latency epoch
};
static_assert(sizeof(Control) <= layout::kControlBytes, "control page");

constexpr uint64_t ring_step(uint64_t epoch, int64_t step) {
    return (epoch << 24) | static_cast<uint64_t>(step);
}

enum class OpKind : int32_t {
    kDispatch = 0,
    kCombine = 1,
    kLowLatencyDispatch = 2,
    kLowLatencyCombine = 3
};

/// What all ranks must ask for alike in one operation.
struct OpSignature {
    OpKind kind;
    DType dtype;
    ScaleFormat scale_format;
    RecvLayout recv_layout;
    int32_t expert_alignment;
    int32_t num_topk;
    int32_t has_weights;
    int32_t apply_weights;
    int64_t capacity;      ///< -1: exact counts
    int64_t handle_epoch;  ///< of the repeated or combined dispatch; 0: none
};

/// kAbsent: a rank that passes others' blocks on says that this one will not come.
enum class OpStatus : int32_t { kOk = 0, kAborted = 1, kAbsent = 2 };

/// One rank's word to all about one operation. Two slots alternate: a rank that publishes epoch e+2
/// has seen every rank's e+1, so every rank has finished e.
struct Announcement {
    static constexpr int64_t kThroughRing = -1;
    std::atomic<uint64_t> epoch;  // ORDER: release by the publisher, acquire by readers
    OpStatus status;
    OpSignature signature;
    int32_t num_tokens;
    int64_t rows_offset;    ///< dispatch: landing rows; combine: rows to read (segment offset), or
                            ///< kThroughRing
    int64_t rows_reserved;  ///< dispatch: bytes usable at rows_offset
    int32_t generation;
    char message[kMessageBytes];
};
static_assert(sizeof(Announcement) <= layout::kAnnouncementHeadBytes, "announcement head");

/// Head of one source's block in a low-latency slot.
struct BlockHeader {
    std::atomic<uint64_t> epoch;  // ORDER: release by the sender, acquire by the receiver
    OpStatus status;
    OpSignature signature;
    int32_t num_rows;
    int32_t refused_by;  ///< rank that refused, where status is kAborted
    char message[kMessageBytes];
};
static_assert(sizeof(BlockHeader) <= layout::kBlockHeaderBytes, "block header");

void copy_message(char (&target)[kMessageBytes], const std::string& text);

/// Throws ConfigMismatch naming the first field in which other differs from own.
void check_same_signature(const OpSignature& own, int32_t own_rank, const OpSignature& other,
                          int32_t other_rank);

const char* op_name(OpKind kind);

}  // namespace deepcomm::cpu
