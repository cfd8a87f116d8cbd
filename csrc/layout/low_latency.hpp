// SPDX-License-Identifier: Apache-2.0
// Byte map of the symmetric memory of the low-latency operations on GPUs, and of the records they
// leave. Everything that crosses ranks is in packets: 16 bytes stored at once, 12 of payload and the
// number of the operation, so that data and arrival flag are one.
//
//   0                     slot 0                       slot 1
//   +-------------------------+----------------------------+------------------------+
//   | credits uint64 [S][R]   | headers | weights | rows   | ...                    |
//   +-------------------------+----------------------------+------------------------+
//     credit [s][p]: the last operation in slot s that peer p has read
//
//   one slot, each part by peer:
//     headers  [R][header_packets]    what the peer announces: a dispatch its counts, or why not
//     weights  [R][T][weight_packets] combine: weights given at the source
//     rows     [R][T] of row_stride   dispatch: token t of source s; combine: token t, summed by s
//
//   and with several nodes, N of G ranks, by node of the source, for the ranks of this node:
//     rail headers [N][G][header_packets]  those that this rank passes on
//     rail heads   [N][T][K]               of rows, with experts of the whole node
//     rail rows    [N][T] of row_stride    combine: this rank's own part of what it sums for others
//
//   header (dispatch):  signature | tokens and flags | extra || counts[L] | token bits[ceil(T/32)]
//   row:                head [K] packets || payload: row words, then scale words, 3 a packet
//     head, dispatch:   packet k: local expert or kNoExpert | position at its source | weight
//     head, combine:    the K weights carried back, 3 a packet
//
//   Example: R=8, L=32, T=128, K=8, H=7168: header 17 packets, weights 3, row 8 + 1195 packets in
//   19328 bytes; one slot 19,843,200 bytes, four of them and the credits 79,373,056. As two nodes of
//   four ranks, each slot has 4,982,912 bytes more.
#pragma once

#include "common/types.hpp"
#include "layout/cursor.hpp"

namespace deepcomm::layout {

constexpr int64_t kPacketBytes = 16;
constexpr int64_t kPacketWords = 3;    ///< of payload
constexpr int64_t kHeaderWords = 3;    ///< before the counts: one packet
constexpr int64_t kMessageWords = 48;  ///< of a refusal's text, in the packets after the first
constexpr int64_t kLowLatencyAlign = 128;
constexpr int64_t kTokenBits = 32;  ///< tokens a word of a header

// What kernels keep in shared memory bounds the sizes; the host checks them.
constexpr int64_t kMaxLowLatencyRanks = 128;
constexpr int64_t kMaxLowLatencyExperts = 1024;
constexpr int64_t kMaxLowLatencyTokenWords = 1024;  ///< ranks * ceil(tokens of a rank / 32)
constexpr int64_t kMaxLowLatencyHidden = 32768;

constexpr int64_t packets_of(int64_t num_words) { return ceil_div(num_words, kPacketWords); }

struct LowLatencyShape {
    int32_t num_ranks;
    int32_t num_experts;
    int32_t num_topk;
    int32_t hidden;
    int32_t max_tokens;
    int32_t num_slots;
    int32_t ranks_per_node;  ///< num_ranks: one node

    constexpr int64_t num_local_experts() const { return num_experts / num_ranks; }
    constexpr int64_t token_words() const { return ceil_div(max_tokens, kTokenBits); }
    constexpr int32_t num_nodes() const { return num_ranks / ranks_per_node; }
};

/// Offsets in bytes; those of the parts of a slot are relative to it.
struct LowLatencyLayout {
    int32_t num_ranks;
    int32_t num_local_experts;
    int32_t num_topk;
    int32_t max_tokens;
    int32_t num_slots;
    int32_t token_words;
    int32_t header_packets;
    int32_t weight_packets;
    int32_t ranks_per_node;
    int64_t row_stride;
    int64_t weights;
    int64_t rows;
    int64_t rail_headers;
    int64_t rail_heads;
    int64_t rail_rows;
    int64_t slots;
    int64_t slot_stride;
    int64_t total_bytes;

    static constexpr LowLatencyLayout make(const LowLatencyShape& shape) {
        LowLatencyLayout map{};
        map.num_ranks = shape.num_ranks;
        map.num_local_experts = static_cast<int32_t>(shape.num_local_experts());
        map.num_topk = shape.num_topk;
        map.max_tokens = shape.max_tokens;
        map.num_slots = shape.num_slots;
        map.ranks_per_node = shape.ranks_per_node;
        map.token_words = static_cast<int32_t>(shape.token_words());
        const int64_t header =
            packets_of(kHeaderWords + shape.num_local_experts() + shape.token_words());
        const int64_t refusal = 1 + packets_of(kMessageWords);
        map.header_packets = static_cast<int32_t>(header > refusal ? header : refusal);
        map.weight_packets = static_cast<int32_t>(packets_of(shape.num_topk));
        map.row_stride = round_up((shape.num_topk + packets_of(shape.hidden / 2)) * kPacketBytes,
                                  kLowLatencyAlign);

        const int64_t max_rows = static_cast<int64_t>(shape.num_ranks) * shape.max_tokens;
        Cursor slot;
        slot.take(shape.num_ranks * map.header_packets * kPacketBytes, kLowLatencyAlign);
        map.weights = slot.take(max_rows * map.weight_packets * kPacketBytes, kLowLatencyAlign);
        map.rows = slot.take(max_rows * map.row_stride, kLowLatencyAlign);
        map.take_rail(shape, &slot);
        map.slot_stride = slot.end(kLowLatencyAlign);

        Cursor all;
        all.take_array<uint64_t>(static_cast<int64_t>(shape.num_slots) * shape.num_ranks,
                                 kLowLatencyAlign);
        map.slots = all.take(map.slot_stride * shape.num_slots, kLowLatencyAlign);
        map.total_bytes = all.end(kLowLatencyAlign);
        return map;
    }

    constexpr void take_rail(const LowLatencyShape& shape, Cursor* slot) {
        if (shape.num_nodes() == 1) return;
        const int64_t max_rows = static_cast<int64_t>(shape.num_nodes()) * shape.max_tokens;
        rail_headers = slot->take(num_ranks * header_packets * kPacketBytes, kLowLatencyAlign);
        rail_heads = slot->take(max_rows * num_topk * kPacketBytes, kLowLatencyAlign);
        rail_rows = slot->take(max_rows * row_stride, kLowLatencyAlign);
    }

    constexpr int64_t credit_offset(int32_t slot_idx, int32_t peer) const {
        return (static_cast<int64_t>(slot_idx) * num_ranks + peer) *
               static_cast<int64_t>(sizeof(uint64_t));
    }
    constexpr int64_t slot_offset(int32_t slot_idx) const { return slots + slot_idx * slot_stride; }
    constexpr int64_t header_offset(int32_t slot_idx, int32_t peer) const {
        return slot_offset(slot_idx) + static_cast<int64_t>(peer) * header_packets * kPacketBytes;
    }
    constexpr int64_t weights_offset(int32_t slot_idx, int32_t peer, int32_t token) const {
        const int64_t index = static_cast<int64_t>(peer) * max_tokens + token;
        return slot_offset(slot_idx) + weights + index * weight_packets * kPacketBytes;
    }
    constexpr int64_t row_offset(int32_t slot_idx, int32_t peer, int32_t token) const {
        const int64_t index = static_cast<int64_t>(peer) * max_tokens + token;
        return slot_offset(slot_idx) + rows + index * row_stride;
    }
    /// The header of the rail's rank of a node for the local-th rank of this one.
    constexpr int64_t rail_header_offset(int32_t slot_idx, int32_t node, int32_t local) const {
        const int64_t index = static_cast<int64_t>(node) * ranks_per_node + local;
        return slot_offset(slot_idx) + rail_headers + index * header_packets * kPacketBytes;
    }
    constexpr int64_t rail_head_offset(int32_t slot_idx, int32_t node, int32_t token) const {
        const int64_t index = static_cast<int64_t>(node) * max_tokens + token;
        return slot_offset(slot_idx) + rail_heads + index * num_topk * kPacketBytes;
    }
    constexpr int64_t rail_row_offset(int32_t slot_idx, int32_t node, int32_t token) const {
        const int64_t index = static_cast<int64_t>(node) * max_tokens + token;
        return slot_offset(slot_idx) + rail_rows + index * row_stride;
    }
};

constexpr LowLatencyShape kExampleShape = {8, 256, 8, 7168, 128, 4, 8};
constexpr LowLatencyLayout kExampleLayout = LowLatencyLayout::make(kExampleShape);
static_assert(kExampleLayout.header_packets == 17, "example above");
static_assert(kExampleLayout.weight_packets == 3, "example above");
static_assert(kExampleLayout.row_stride == 19328, "example above");
static_assert(kExampleLayout.slot_stride == 19843200, "example above");
static_assert(kExampleLayout.total_bytes == 79373056, "example above");
constexpr LowLatencyShape kNodesShape = {8, 256, 8, 7168, 128, 4, 4};
constexpr LowLatencyLayout kNodesLayout = LowLatencyLayout::make(kNodesShape);
static_assert(kNodesLayout.slot_stride == 19843200 + 2176 + 32768 + 4947968, "example above");

/// An operation's turn: its number, the tag of its packets (never 0, which fresh memory holds) and
/// its slot. Counted in device memory, so that a replayed graph counts on.
struct LowLatencyTurn {
    uint64_t number;
    uint32_t tag;
    int32_t slot;
};

/// The turn after one: number 1 with tag 1 in slot 0 after none.
constexpr LowLatencyTurn next_turn(const LowLatencyTurn& last, int32_t num_slots) {
    const bool is_first = last.number == 0;
    return {last.number + 1, last.tag == 0xFFFFFFFFu ? 1u : last.tag + 1,
            is_first || last.slot + 1 == num_slots ? 0 : last.slot + 1};
}

constexpr int32_t kMaxLowLatencySlots = 64;

/// What a rank's operations share, in zeroed memory of its device.
struct LowLatencyState {
    LowLatencyTurn last;                                 ///< of the last operation that was sent
    uint32_t num_send_finished;                          ///< blocks of the running kernel
    uint32_t num_receive_finished[kMaxLowLatencySlots];  ///< likewise, by slot
};

/// What a dispatch leaves for the combines of its handle: 32-bit words in memory of the device,
/// which begin at a multiple of 16 bytes.
/// An entry is slot + (column of topk_idx << kEntrySlotBits), by expert, kNoEntry after the last.
struct LowLatencyRecordLayout {
    int64_t turn;        ///< LowLatencyTurn of the dispatch
    int64_t is_void;     ///< the dispatch was refused: combines do nothing
    int64_t tag;         ///< of the dispatch
    int64_t connected;   ///< [R] ranks that this rank sent to
    int64_t num_tokens;  ///< [R] tokens of each source
    int64_t entries;     ///< [R, T, K]
    int64_t weights;     ///< [R, T, K] float, in the order of the entries
    int64_t routes;      ///< [N, T, K] several nodes: local rank here of the rail's tokens' experts
    int64_t num_words;

    static constexpr LowLatencyRecordLayout make(int32_t num_ranks, int32_t max_tokens,
                                                 int32_t num_topk, int32_t num_nodes) {
        LowLatencyRecordLayout map{};
        Cursor cursor;
        const int64_t num_entries = static_cast<int64_t>(num_ranks) * max_tokens * num_topk;
        map.turn = cursor.take(sizeof(LowLatencyTurn) / sizeof(int32_t), 1);
        map.is_void = cursor.take(1, 1);
        map.tag = cursor.take(1, 1);
        map.connected = cursor.take(num_ranks, 1);
        map.num_tokens = cursor.take(num_ranks, 1);
        map.entries = cursor.take(num_entries, 1);
        map.weights = cursor.take(num_entries, 1);
        const int64_t num_relayed = num_nodes == 1 ? 0 : num_entries / num_ranks * num_nodes;
        map.routes = cursor.take(num_relayed, 1);
        map.num_words = cursor.end();
        return map;
    }
};

constexpr int32_t kEntrySlotBits = 26;
constexpr int32_t kNoEntry = -1;
static_assert(kMaxLowLatencyExperts * kMaxLowLatencyTokenWords * kTokenBits <=
                  int64_t{1} << kEntrySlotBits,
              "slots of all blocks fit an entry");
static_assert(int64_t{kMaxTopk} << kEntrySlotBits <= int64_t{1} << 31, "columns leave the sign");

enum class RefusalKind : int32_t {
    kNone = 0,
    kByHost = 1,
    kIdRange = 2,
    kIdTwice = 3,
    kDiffers = 4,
    kAbsent = 5,  ///< several nodes: that rank takes no part, says who would pass it on
};

/// Why an operation delivered nothing; in memory shared with the host, which clears it. The first
/// reason stays. state as of ErrorRecord.
///
///   0       4      8           12        16      20     24       28       32      40     64
///   +-------+------+-----------+---------+-------+------+--------+--------+-------+------+--------+
///   | state | kind | operation | culprit | token | topk | signature mine, theirs | value | message|
///   +-------+------+-----------+---------+-------+------+--------+--------+-------+------+--------+
struct LowLatencyStatus {
    uint32_t state;
    RefusalKind kind;
    int32_t operation;  ///< layout::Operation
    int32_t culprit;
    int32_t token;  ///< kIdRange, kIdTwice on the rank at fault
    int32_t topk;   ///< column of the id
    uint32_t signature;
    uint32_t peer_signature;
    int64_t value;  ///< the id
    uint32_t free[6];
    uint32_t message[kMessageWords];  ///< kByHost: bytes of the text, 0 after the last
};

static_assert(sizeof(LowLatencyStatus) == 256, "drawing above");

}  // namespace deepcomm::layout
