// SPDX-License-Identifier: Apache-2.0
// Byte map of the symmetric memory of the low-latency operations on GPUs, and of the records they
// leave. Everything that crosses ranks is in packets: 16 bytes stored at once, which say themselves that they
// are here. Tagged ones bring 12 bytes and the number of the operation; dense ones, rows on one node, 16 bytes
// that are not there yet where they are zero.
//
//   0                     slot 0                       slot 1
//   +-------------------------+----------------------------+------------------------+
//   | credits uint64 [S][R]   | headers | weights | rows   | ...                    |
//   +-------------------------+----------------------------+------------------------+
//     credit [s][p]: the last operation in slot s that peer p has ended, and whether it has left rows unread
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
//   row:                head [K] packets, of the buffer's K || payload: row words, then scale words
//     head, dispatch:   packet k: local expert or kNoExpert | position at its source | weight
//     head, combine:    the K weights carried back, 3 a packet
//     payload, packets: of 4 words on one node, else of 3 and the tag
//     payload, combine: row_parts(H) parts, each with part_packets(H) packets of its own
//
//   Where a network carries the rails (PROTOCOLS.md: low latency over carried rails), what one rank
//   writes in a slot is a region of its own, and mirrors are those that it writes for its rail:
//     region [R], mirror [N - 1]:  header | rail headers [G] | weights [T] | rail heads [T] | rows [T]
//     rail rows [N][T]
//
//   Example: R=8, L=32, T=128, K=8, H=7168: header 17 packets, weights 3, row 8 + 896 packets in 14464
//   bytes; one slot 14,862,464 bytes, four of them and the credits 59,450,112. As two nodes of four ranks
//   rows have 8 + 1195 packets, of a combine 8 + 2 * 598, in 19328 bytes, and a slot has 24,826,112; carried,
//   regions of 2,635,776 bytes, 9 a slot.
#pragma once

#include "common/types.hpp"
#include "layout/cursor.hpp"

namespace deepcomm::layout {

constexpr int64_t kPacketBytes = 16;
constexpr int64_t kPacketWords = 3;    ///< of payload, beside a tag
constexpr int64_t kDenseWords = 4;     ///< of payload, without one: rows on one node
constexpr int64_t kHeaderWords = 3;    ///< before the counts: one packet
constexpr int64_t kMessageWords = 48;  ///< of a refusal's text, in the packets after the first
constexpr int64_t kLowLatencyAlign = 128;
constexpr int64_t kTokenBits = 32;  ///< tokens a word of a header

// What kernels keep in shared memory bounds the sizes; the host checks them.
constexpr int64_t kMaxLowLatencyRanks = 128;
constexpr int64_t kMaxLowLatencyExperts = 1024;
constexpr int64_t kMaxLowLatencyTokenWords = 1024;  ///< ranks * ceil(tokens of a rank / 32)
constexpr int64_t kMaxLowLatencyHidden = 32768;

constexpr int64_t packets_of(int64_t num_words, int64_t packet_words = kPacketWords) {
    return ceil_div(num_words, packet_words);
}

// A block of a combine sums, and receives, a part of a row: 16-byte vectors, as many in each part; the
// last may have fewer, and zeros behind them in its packets.
constexpr int64_t kMaxPartHidden = 4096;  ///< two vectors for each of 256 threads
constexpr int64_t kVectorHidden = 8;
constexpr int64_t kVectorWords = 4;

constexpr int64_t row_parts(int64_t hidden) { return ceil_div(hidden, kMaxPartHidden); }
constexpr int64_t part_vectors(int64_t hidden) {
    return ceil_div(ceil_div(hidden, kVectorHidden), row_parts(hidden));
}
constexpr int64_t part_packets(int64_t hidden, int64_t packet_words) {
    return packets_of(part_vectors(hidden) * kVectorWords, packet_words);
}

struct LowLatencyShape {
    int32_t num_ranks;
    int32_t num_experts;
    int32_t num_topk;
    int32_t hidden;
    int32_t max_tokens;
    int32_t num_slots;
    int32_t ranks_per_node;  ///< num_ranks: one node
    int32_t is_carried;      ///< a network is between nodes

    constexpr int64_t num_local_experts() const { return num_experts / num_ranks; }
    constexpr int64_t token_words() const { return ceil_div(max_tokens, kTokenBits); }
    constexpr int32_t num_nodes() const { return num_ranks / ranks_per_node; }
    /// Words of a row's packet.
    constexpr int64_t packet_words() const { return num_nodes() == 1 ? kDenseWords : kPacketWords; }
    /// Bytes of a row whose payload has so many packets.
    constexpr int64_t row_bytes(int64_t num_packets) const {
        return round_up((num_topk + num_packets) * kPacketBytes, kLowLatencyAlign);
    }
    /// Of a BF16 row of a combine, the longest: a dispatch's is not cut into parts.
    constexpr int64_t bf16_row_bytes() const {
        return row_bytes(row_parts(hidden) * part_packets(hidden, packet_words()));
    }
    /// Of an FP8 row with FP32 scales, the longest of those.
    constexpr int64_t fp8_row_bytes() const {
        return row_bytes(packets_of(ceil_div(hidden, 4) + ceil_div(hidden, kScaleTile)));
    }
};

/// Offsets in bytes; those of the parts of a slot are relative to it. Steps are in packets, from one
/// rank's or node's part to the next.
struct LowLatencyLayout {
    Divisor num_ranks;
    Divisor num_local_experts;
    int32_t num_topk;
    int32_t max_tokens;
    int32_t num_slots;
    int32_t token_words;
    Divisor header_packets;
    int32_t weight_packets;
    Divisor ranks_per_node;
    int32_t header_step;
    int32_t peer_weights;  ///< from one peer's weights to the next one's, in weights of a token
    int32_t peer_rows;     ///< likewise rows
    int32_t rail_header_step;
    int32_t rail_head_step;
    int64_t row_stride;
    int64_t weights;
    int64_t rows;
    int64_t rail_headers;
    int64_t rail_heads;
    int64_t rail_rows;
    int64_t mirrors;
    int64_t slots;
    int64_t slot_stride;
    int64_t total_bytes;

    /// rail_idx: of the owner in its node; only where rails are carried it matters.
    static constexpr LowLatencyLayout make(const LowLatencyShape& shape, int32_t rail_idx = 0) {
        LowLatencyLayout map{};
        map.num_ranks = Divisor::of(shape.num_ranks);
        map.num_local_experts = Divisor::of(static_cast<int32_t>(shape.num_local_experts()));
        map.num_topk = shape.num_topk;
        map.max_tokens = shape.max_tokens;
        map.num_slots = shape.num_slots;
        map.ranks_per_node = Divisor::of(shape.ranks_per_node);
        map.token_words = static_cast<int32_t>(shape.token_words());
        const int64_t header =
            packets_of(kHeaderWords + shape.num_local_experts() + shape.token_words());
        const int64_t refusal = 1 + packets_of(kMessageWords);
        map.header_packets = Divisor::of(static_cast<int32_t>(header > refusal ? header : refusal));
        map.weight_packets = static_cast<int32_t>(packets_of(shape.num_topk));

        Cursor slot;
        if (shape.is_carried != 0) {
            map.take_regions(shape, rail_idx, &slot);
        } else {
            map.take_parts(shape, &slot);
        }
        map.slot_stride = slot.end(kLowLatencyAlign);

        Cursor all;
        all.take_array<uint64_t>(static_cast<int64_t>(shape.num_slots) * shape.num_ranks,
                                 kLowLatencyAlign);
        map.slots = all.take(map.slot_stride * shape.num_slots, kLowLatencyAlign);
        map.total_bytes = all.end(kLowLatencyAlign);
        return map;
    }

    /// Each part by peer.
    constexpr void take_parts(const LowLatencyShape& shape, Cursor* slot) {
        row_stride = shape.bf16_row_bytes();
        header_step = header_packets;
        peer_weights = peer_rows = max_tokens;
        rail_header_step = ranks_per_node * header_packets;
        rail_head_step = max_tokens * num_topk;
        const int64_t max_rows = int64_t{num_ranks} * max_tokens;
        take_packets(int64_t{num_ranks} * header_packets, slot);
        weights = take_packets(max_rows * weight_packets, slot);
        rows = slot->take(max_rows * row_stride, kLowLatencyAlign);
        if (shape.num_nodes() == 1) return;
        rail_headers = take_packets(int64_t{shape.num_nodes()} * rail_header_step, slot);
        rail_heads = take_packets(int64_t{shape.num_nodes()} * rail_head_step, slot);
        rail_rows =
            slot->take(int64_t{shape.num_nodes()} * max_tokens * row_stride, kLowLatencyAlign);
    }

    /// Each peer's parts together, so that a network carries them as one. FP8 rows take half of the
    /// bytes that BF16 ones do, and a region is a whole number of each and of weights.
    constexpr void take_regions(const LowLatencyShape& shape, int32_t rail_idx, Cursor* slot) {
        const int64_t bf16_bytes = shape.bf16_row_bytes(), fp8_bytes = 2 * shape.fp8_row_bytes();
        row_stride =
            round_up(bf16_bytes > fp8_bytes ? bf16_bytes : fp8_bytes, 2 * kLowLatencyAlign);
        Cursor region;
        take_packets(header_packets, &region);
        rail_headers = take_packets(int64_t{ranks_per_node} * header_packets, &region);
        weights = take_packets(int64_t{max_tokens} * weight_packets, &region);
        rail_heads = take_packets(int64_t{max_tokens} * num_topk, &region);
        rows = region.take(int64_t{max_tokens} * row_stride, kLowLatencyAlign);
        const int64_t num_bytes = region.end(weight_packets * row_stride);
        header_step = static_cast<int32_t>(num_bytes / kPacketBytes);
        peer_weights = header_step / weight_packets;
        peer_rows = static_cast<int32_t>(num_bytes / row_stride);
        // By node: what the rank of this one's rail there has written.
        rail_header_step = rail_head_step = header_step * ranks_per_node;
        rail_headers += rail_idx * num_bytes;
        rail_heads += rail_idx * num_bytes;
        slot->take(num_ranks * num_bytes, kLowLatencyAlign);
        mirrors = slot->take((shape.num_nodes() - 1) * num_bytes, kLowLatencyAlign);
        rail_rows =
            slot->take(int64_t{shape.num_nodes()} * max_tokens * row_stride, kLowLatencyAlign);
    }

    static constexpr int64_t take_packets(int64_t num_packets, Cursor* cursor) {
        return cursor->take(num_packets * kPacketBytes, kLowLatencyAlign);
    }

    /// The same regions for a dispatch of FP8 rows.
    constexpr LowLatencyLayout with_fp8_rows() const {
        LowLatencyLayout map = *this;
        map.row_stride /= 2;
        map.peer_rows *= 2;
        return map;
    }

    constexpr int64_t credit_offset(int32_t slot_idx, int32_t peer) const {
        return (static_cast<int64_t>(slot_idx) * num_ranks + peer) *
               static_cast<int64_t>(sizeof(uint64_t));
    }
    constexpr int64_t slot_offset(int32_t slot_idx) const { return slots + slot_idx * slot_stride; }
    constexpr int64_t header_offset(int32_t slot_idx, int32_t peer) const {
        return slot_offset(slot_idx) + static_cast<int64_t>(peer) * header_step * kPacketBytes;
    }
    constexpr int64_t weights_offset(int32_t slot_idx, int32_t peer, int32_t token) const {
        const int64_t index = static_cast<int64_t>(peer) * peer_weights + token;
        return slot_offset(slot_idx) + weights + index * weight_packets * kPacketBytes;
    }
    constexpr int64_t row_offset(int32_t slot_idx, int32_t peer, int32_t token) const {
        const int64_t index = static_cast<int64_t>(peer) * peer_rows + token;
        return slot_offset(slot_idx) + rows + index * row_stride;
    }
    /// The header of the rail's rank of a node for the local-th rank of this one.
    constexpr int64_t rail_header_offset(int32_t slot_idx, int32_t node, int32_t local) const {
        const int64_t index =
            static_cast<int64_t>(node) * rail_header_step + local * header_packets;
        return slot_offset(slot_idx) + rail_headers + index * kPacketBytes;
    }
    constexpr int64_t rail_head_offset(int32_t slot_idx, int32_t node, int32_t token) const {
        const int64_t index = static_cast<int64_t>(node) * rail_head_step + token * num_topk;
        return slot_offset(slot_idx) + rail_heads + index * kPacketBytes;
    }
    constexpr int64_t rail_row_offset(int32_t slot_idx, int32_t node, int32_t token) const {
        const int64_t index = static_cast<int64_t>(node) * max_tokens + token;
        return slot_offset(slot_idx) + rail_rows + index * row_stride;
    }

    /// Where rails are carried: the mirror of a region at the rail's rank of the index-th other node.
    constexpr int64_t mirror_offset(int32_t slot_idx, int32_t index) const {
        return slot_offset(slot_idx) + mirrors + int64_t{index} * header_step * kPacketBytes;
    }
    /// Bytes of a region up to the rows: all that travels with weights that are given at sources.
    constexpr int64_t head_bytes() const { return rows; }
    /// Bytes of a region up to the end of its rows.
    constexpr int64_t region_bytes() const { return rows + max_tokens * row_stride; }
};

constexpr LowLatencyShape kExampleShape = {8, 256, 8, 7168, 128, 4, 8, 0};
constexpr LowLatencyLayout kExampleLayout = LowLatencyLayout::make(kExampleShape);
static_assert(kExampleLayout.header_packets == 17, "example above");
static_assert(kExampleLayout.weight_packets == 3, "example above");
static_assert(packets_of(7168 / 2) == 1195, "example above");
static_assert(row_parts(7168) == 2 && part_packets(7168, kPacketWords) == 598, "example above");
static_assert(kExampleLayout.row_stride == 14464, "example above");
static_assert(kExampleLayout.slot_stride == 14862464, "example above");
static_assert(kExampleLayout.total_bytes == 59450112, "example above");
constexpr LowLatencyShape kNodesShape = {8, 256, 8, 7168, 128, 4, 4, 0};
constexpr LowLatencyLayout kNodesLayout = LowLatencyLayout::make(kNodesShape);
static_assert(kNodesLayout.slot_stride == 24826112, "example above");
static_assert(kNodesLayout.row_stride == 19328, "example above");
constexpr LowLatencyShape kCarriedShape = {8, 256, 8, 7168, 128, 4, 4, 1};
constexpr LowLatencyLayout kCarriedLayout = LowLatencyLayout::make(kCarriedShape);
static_assert(kCarriedLayout.header_step * kPacketBytes == 2635776, "example above");
static_assert(kCarriedLayout.slot_stride == 9 * 2635776 + 5111808, "example above");

/// An operation's turn: its number from 1 on, the tag of its packets (never 0, which fresh memory holds)
/// and its slot.
struct LowLatencyTurn {
    uint64_t number;
    uint32_t tag;
    int32_t slot;
};

/// Of a number. Written so that a device, which divides 32 bits fast, has no need of more.
constexpr LowLatencyTurn turn_of(uint64_t number, int32_t num_slots) {
    constexpr uint32_t kNumTags = 0xFFFFFFFFu;
    const auto high = static_cast<uint32_t>((number - 1) >> 32);
    const auto low = static_cast<uint32_t>(number - 1), num = static_cast<uint32_t>(num_slots);
    const uint32_t to_tag = kNumTags - low;  // before the tags begin again
    const uint32_t tag = high < to_tag ? low + high : high - to_tag;
    uint32_t slot = low % num;
    if (high != 0) slot = (slot + high % num * ((kNumTags % num + 1) % num)) % num;
    return {number, tag + 1, static_cast<int32_t>(slot)};
}
static_assert(turn_of(1, 4).tag == 1 && turn_of(1, 4).slot == 0, "of the first");
static_assert(turn_of(0xFFFFFFFFu, 3).tag == 0xFFFFFFFFu, "the last tag");
static_assert(turn_of(0x100000000u, 3).tag == 1 && turn_of(0x100000000u, 3).slot == 0, "again");
static_assert(turn_of(0x100000002u, 3).tag == 3 && turn_of(0x100000002u, 3).slot == 2, "again");

constexpr int32_t kMaxLowLatencySlots = 64;

/// Of a credit: rows have been left unread, and must not be written over yet.
constexpr uint64_t kUnread = uint64_t{1} << 63;

/// What the blocks of a launch that sends add to `LowLatencyState.sends`, all together: a block that has not
/// added its part sees by whole units how many launches there were before.
constexpr uint64_t kSendUnit = 1 << 16;

/// What a rank's operations share, in zeroed memory of its device. Counted there, so that a replayed graph
/// counts on.
struct LowLatencyState {
    uint64_t sends;
    uint32_t num_receive_finished[kMaxLowLatencySlots];  ///< blocks, by slot; see finish_receive
    uint64_t received[kMaxLowLatencySlots];              ///< numbers of the operations there
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
