// SPDX-License-Identifier: Apache-2.0
// Arguments of the low-latency kernels. Shapes in the letters of csrc/README.md; T here is
// max_tokens where it names memory, num_tokens where it counts.
#pragma once

#include "kernels/params.hpp"
#include "layout/low_latency.hpp"

namespace deepcomm::kernels {

/// Which part of an operation a launch does: a template argument of dispatch and combine. With
/// kOverNodes the operation is one of several nodes of several ranks, whose receive phase passes on.
/// With kCarried a network is between the nodes. What a combine sends along the rail then comes from
/// launches of their own, and the network is at work behind them.
enum LowLatencyPhase : int32_t {
    kSendPhase = 1,
    kReceivePhase = 2,
    kBothPhases = 3,
    kOverNodes = 4,
    kCarried = 8,
    kAnnouncePhase = 16,  ///< before the send phase, where weights are given at the sources
    kPassOnPhase = 32,    ///< behind it: sums for other nodes
    kKeepSums = 64  ///< of a combine that does both: a block keeps a sum of this rank's own rows
};

constexpr int32_t kNumLowLatencyRoles = static_cast<int32_t>(layout::Role::kMeet);

/// Rows of a dispatch, as given and as they travel: a template argument.
enum class LowLatencyRows : int32_t {
    kBf16 = 0,
    kFp8Fp32 = 1,   ///< FP8 as given, FP32 scales
    kFp8Ue8m0 = 2,  ///< likewise UE8M0
    kCastFp32 = 3,  ///< BF16 given, cast to FP8
    kCastUe8m0 = 4,
};

/// What all of them have.
struct LowLatencyParams {
    CommParams comm;
    layout::LowLatencyLayout map;
    layout::LowLatencyRecordLayout record_map;
    unsigned char* const* credit_bases;  ///< [R] where credits go; comm.bases: what is sent
    unsigned char* local;                ///< this rank's symmetric memory
    layout::LowLatencyState* state;      ///< of this buffer on this rank
    layout::LowLatencyTurn* turn;  ///< of this operation: the send phase tells the receive phase
    uint32_t* rank_mask;           ///< [R] 1: the peer is skipped
    uint64_t* decisions;           ///< [slots, R] who takes part, where a late source is masked
    uint64_t* unread;              ///< [2 * slots, R + 1] see unread_of; null over nodes
    uint32_t* late_ranks;          ///< [R] in memory shared with the host: 1 once masked as late
    layout::LowLatencyStatus* status;
    int64_t* wait_us;    ///< [R] statistics to add to, or null
    int32_t* record;     ///< of the dispatch
    uint32_t signature;  ///< of the arguments that all ranks must agree on
    Divisor num_topk;    ///< K of this operation
    int32_t num_tokens;  ///< of this rank
    int32_t mask_late;   ///< a late peer is masked instead of failing the operation
    int32_t node_idx;    ///< of this rank
    int32_t rail_idx;    ///< its index in the node
    /// Of each wait, by role: over several nodes some wait for ranks that wait themselves.
    uint64_t timeouts_ns[kNumLowLatencyRoles];
};

struct LowLatencyDispatchParams {
    LowLatencyParams base;
    // What goes in; read by the send phase.
    const unsigned char* x;  ///< rows as given, x_stride bytes apart
    int64_t x_stride;
    const uint32_t* scales;  ///< rows of scale words, scale_stride words apart; FP8 as given
    int64_t scale_stride;
    const void* topk_idx;       ///< [T, K], int32 or int64
    const float* topk_weights;  ///< [T, K] or null
    int32_t* handle_topk_idx;   ///< [T, K] copies for the handle
    float* handle_topk_weights;
    int32_t topk_idx_is_int64;
    int32_t num_experts;
    // What comes out; written by the receive phase. Slots are rows of x, all blocks together.
    unsigned char* out_x;
    uint32_t* out_scales;  ///< word w of row r of block b: b * block + r * row + w * word
    int64_t scale_block_stride;
    int64_t scale_row_stride;
    int64_t scale_word_stride;
    void* out_topk_idx;       ///< TOKEN: [R * T, K] as topk_idx
    float* out_topk_weights;  ///< TOKEN: [R * T, K], else [L, R * T]; or null
    int32_t* counts;          ///< [L]
    int32_t* num_recv;
    void* expert_token_stats;  ///< [L] int32 or int64 to add to, or null
    int32_t stats_is_int64;
    int32_t is_token_layout;
    int32_t admits_next;  ///< whether the next kernel may be launched before this one has ended
};

struct LowLatencyCombineParams {
    LowLatencyParams base;
    const unsigned char* y;  ///< rows by slot, y_stride bytes apart
    int64_t y_stride;
    const int32_t* topk_idx;      ///< [T, K] of the handle
    const float* source_weights;  ///< [T, K] to be applied instead of the recorded ones, or null
    const float* carried;         ///< to bring back: TOKEN [R * T, K], else one a slot; or null
    float* out_topk_weights;      ///< [T, K]: carried, back
    const unsigned char* bias;    ///< rows bias_stride bytes apart, or null
    int64_t bias_stride;
    unsigned char* out;  ///< [T, H]
    int32_t apply_weights;
    int32_t is_token_layout;
};

/// What a launch of low_latency_refuse_carried does: they come one after the other.
enum class RefuseStep : int32_t { kTell = 0, kPassOn = 1, kEnd = 2 };

/// low_latency_refuse: takes an operation's turn without delivering, and says why.
struct LowLatencyRefuseParams {
    LowLatencyParams base;
    int32_t is_combine;
    RefuseStep step;  ///< where a network carries the rails
    uint32_t message[layout::kMessageWords];
};

/// low_latency_mask: sets one word of the rank mask, in the stream's order.
struct LowLatencyMaskParams {
    uint32_t* rank_mask;
    int32_t peer;
    uint32_t value;
};

/// low_latency_mark: tells the host how far a stream has come.
struct LowLatencyMarkParams {
    uint32_t* word;  ///< in memory shared with the host
    uint32_t value;
};

}  // namespace deepcomm::kernels
