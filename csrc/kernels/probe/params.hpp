// SPDX-License-Identifier: Apache-2.0
// Arguments of the probes: small kernels, one a primitive protocol, that run under the emulator, on
// one GPU with several ranks, and between GPUs, both as tests and as measurements.
#pragma once

#include "common/int.hpp"
#include "layout/error_record.hpp"

namespace deepcomm::kernels {

constexpr int32_t kMaxProbeRanks = 8;

/// What every probe has: who it is, whom it writes to and hears from, and how long it waits.
struct ProbeParams {
    int32_t rank;
    int32_t dst_rank;  ///< the peer this rank sends to
    int32_t src_rank;  ///< the peer it receives from
    int32_t num_rounds;
    int32_t num_words;  ///< 32-bit words of payload a round
    uint64_t timeout_ns;
    layout::ErrorRecord* record;
};

/// probe_signal: payload by plain stores, then a signal.
struct SignalParams {
    ProbeParams probe;
    uint32_t* dst_payload;  ///< [num_rounds, num_words] in dst_rank's memory
    uint32_t* dst_signal;
    const uint32_t* payload;  ///< what src_rank writes here
    const uint32_t* signal;
    uint32_t* sums;  ///< [num_rounds, num_blocks]: of the words received, by block
};

/// probe_claim: at most one of two ranks may enter (store buffering).
struct ClaimParams {
    ProbeParams probe;
    uint32_t* my_claims;          ///< [num_rounds], zeroed
    const uint32_t* peer_claims;  ///< [num_rounds]
    uint32_t* owners;             ///< [num_rounds], plain, shared by both ranks
};

/// probe_bulk_put: tiles go global -> shared -> peer, changed on the way.
struct BulkPutParams {
    ProbeParams probe;
    const uint32_t* src;  ///< [num_tiles, kTileWords]
    uint32_t* dst;        ///< the same in dst_rank's memory
    uint32_t* dst_signal;
    const uint32_t* received;  ///< what src_rank writes here
    const uint32_t* signal;
    uint32_t* copy;  ///< [num_tiles, kTileWords]: received, read back by plain loads
    int32_t num_tiles;
};

/// probe_bulk_copy: tiles go global -> shared -> peer as they are, as fast as the SMs can.
struct BulkCopyParams {
    ProbeParams probe;
    const unsigned char* src;  ///< [num_tiles, tile_bytes]
    unsigned char* dst;        ///< the same in dst_rank's memory
    uint32_t* dst_signal;
    const uint32_t* received;  ///< what src_rank writes here
    const uint32_t* signal;    ///< tiles received in all launches so far
    uint32_t* copy;            ///< received, read back by plain loads; null: left unread
    uint32_t expected_signal;  ///< what this launch waits for
    int32_t num_tiles;
    int32_t tile_bytes;  ///< a multiple of 16, at most kCopyTileBytes
};

/// probe_ring: rounds through fewer slots than rounds; the receiver's credits free them.
struct RingParams {
    ProbeParams probe;
    uint32_t first_epoch;   ///< counter value before the first round (may be close to the wrap)
    uint32_t* dst_slots;    ///< [num_slots, num_words] in dst_rank's memory
    uint32_t* dst_tail;     ///< rounds sent, in dst_rank's memory
    const uint32_t* head;   ///< rounds that dst_rank has freed, in this rank's memory
    const uint32_t* slots;  ///< what src_rank writes here
    const uint32_t* tail;   ///< rounds that src_rank has sent
    uint32_t* src_head;     ///< rounds freed, in src_rank's memory
    uint32_t* folds;        ///< [num_rounds]: non-commutative fold of each round's words
    int32_t num_slots;
};

/// probe_barrier_fold: all blocks of all ranks take turns at one word, separated by barriers.
struct BarrierFoldParams {
    ProbeParams probe;
    uint32_t* accumulator;  ///< one plain word in rank 0's memory
    uint32_t* barrier_words[kMaxProbeRanks];
    void* grid_state;  ///< device::GridBarrierState
    int32_t num_ranks;
};

/// probe_packet: 12 bytes of payload and their epoch in each strong 16-byte store.
struct PacketParams {
    ProbeParams probe;
    void* dst_packets;  ///< [2, num_packets] of 16 bytes in dst_rank's memory, zeroed
    void* packets;      ///< what src_rank writes here
    uint32_t* sums;     ///< [num_rounds, num_packets]
    int32_t num_packets;
};

}  // namespace deepcomm::kernels
