// SPDX-License-Identifier: Apache-2.0
// Role send: each token's row is read once and stored wherever it is needed. A warp takes tokens
// (TOKEN) or chunks of tokens (expert layouts, whose receivers are told chunk by chunk) one after the
// other. PROTOCOLS.md: dispatch_send.
#pragma once

#include "kernels/dispatch/landed.cuh"
#include "kernels/dispatch/pairs.cuh"
#include "kernels/rows/cast.cuh"

namespace deepcomm::kernels {

/// The tokens of one warp, in its order.
template <typename Spec>
struct TokenCursor {
    static constexpr int32_t kChunk = Spec::kByExpert ? layout::kSendChunk : 1;
    // As many as are loaded before the ranks have met.
    using Queue = WorkQueue<1 + Spec::Pipe::kLoadsAhead / kChunk>;

    const SendBlock<Spec>& my;
    Queue& queue;
    const typename Spec::Pipe& pipe;
    LandedRows<Spec> landed;
    int32_t index = 0;  ///< of the next part: token * parts + part

    DEEPCOMM_DEVICE TokenCursor(const SendBlock<Spec>& block, Queue& chunks,
                                const typename Spec::Pipe& rows)
        : my(block), queue(chunks), pipe(rows), landed(block) {}
    DEEPCOMM_DEVICE int32_t chunk_of(int32_t at) const {
        const int32_t piece = queue.at(at / kChunk);
        return my.awaits_rows() ? PieceOrder<Spec, kChunk>{my}.at(piece) : piece;
    }
    DEEPCOMM_DEVICE int32_t token_of(int32_t at) const {
        return chunk_of(at) * kChunk + at % kChunk;
    }
    DEEPCOMM_DEVICE bool is_alive() const { return !landed.has_failed; }
    /// The next part's token.
    DEEPCOMM_DEVICE int32_t token() const { return token_of(index / Spec::kParts); }
    DEEPCOMM_DEVICE bool next(RowPiece* piece) {
        const int32_t token = this->token();
        if (token >= my.num_tokens) return false;
        // Rows that are in the pipe go out before the next one is waited for.
        if (my.awaits_rows() && !landed.have(token, !pipe.has_loads())) return false;
        const RowSource& source = my.params.source;
        piece->row =
            source.rows + token * source.row_stride + index % Spec::kParts * Spec::kLoadBytes;
        ++index;
        if (Spec::kWire == kWireFp8 && my.has_bulk_scales()) {
            piece->scales = source.scales + token * source.scale_stride;
            piece->scale_bytes = my.scale_bytes();
        }
        return true;
    }
};

/// Brings the stage into the form in which the row travels.
template <typename Spec>
DEEPCOMM_DEVICE void prepare_row(const SendBlock<Spec>& my, int32_t token, unsigned char* stage) {
    if (Spec::kWire == kWireCast) {
        cast_row<Spec::kPartHidden>(stage, stage + Spec::kScalesAt,
                                    my.params.scales_are_ue8m0 != 0);
    } else if (Spec::kByExpert && Spec::kWire == kWireFp8 && !my.has_bulk_scales()) {
        copy_words(reinterpret_cast<uint32_t*>(stage + Spec::kScalesAt), source_scales(my, token),
                   my.params.scale_words);
    }
    if (Spec::kWire == kWireBf16 || (Spec::kWire == kWireFp8 && !Spec::kByExpert)) return;
    device::fence_proxy_async();  // ORDER: what the lanes wrote before the bulk stores that read it
    my.warp.sync();               // ORDER: of every lane, and before other lanes read the scales
}

/// Calls visit(dst, slot) in all lanes for each rank that the token's row goes to.
template <typename Spec, typename Visit>
DEEPCOMM_DEVICE void for_each_rank(const SendBlock<Spec>& my, const PairSlots& pair,
                                   Visit&& visit) {
    uint32_t senders = device::warp_ballot(sends_row(my, pair));
    while (senders != 0) {
        const int32_t lane = device::lowest_bit(senders);
        senders &= senders - 1;
        const int32_t dst = device::warp_shuffle(pair.dst, lane);
        visit(dst, device::warp_shuffle(pair.token_slot, lane));
    }
}

/// What the stage holds of the token's row and scales to its ranks; a lane a rank.
template <typename Spec>
DEEPCOMM_DEVICE void send_row(const SendBlock<Spec>& my, const RowPart& part, const PairSlots& pair,
                              const unsigned char* stage) {
    if (!sends_row(my, pair)) return;
    if (Spec::kWire != kWireBf16 && part.has_bulk_scales()) {
        device::bulk_store(landed_scales(my, {pair.dst, pair.token_slot}, part.first_word),
                           staged_scales<Spec>(stage), part.scale_bytes());
    }
    device::bulk_store(my.smem.destinations[pair.dst].rows +
                           static_cast<int64_t>(pair.token_slot) * Spec::kRowBytes + part.at,
                       stage, part.num_bytes);
}

/// What a mover stores beside the row: scales in its stage that bulk copies cannot move, and all that
/// an announcement of the row promises.
template <typename Spec>
DEEPCOMM_DEVICE void send_beside(const SendBlock<Spec>& my, const RowPart& part,
                                 const PairSlots& pair, const unsigned char* stage) {
    constexpr bool kAreStaged =
        Spec::kWire == kWireCast || (Spec::kWire == kWireFp8 && Spec::kByExpert);
    const bool has_scales = kAreStaged && !part.has_bulk_scales();
    const bool has_pairs = Spec::kByExpert && part.is_first();
    if (!has_scales && !has_pairs) return;
    for_each_rank(my, pair, [&](int32_t dst, int32_t slot) {
        if (has_pairs) store_expert_pairs(my, pair, dst, slot);
        if (has_scales) {
            copy_words(landed_scales(my, {dst, slot}, part.first_word), staged_scales<Spec>(stage),
                       part.num_words);
        }
    });
}

/// Rows that a warp has sent to each rank, chunk by chunk. The peers hear of a chunk when all its
/// stores are complete: when those of the next chunk have been issued, so that nobody stands still.
template <typename Spec>
struct ChunkAnnouncer {
    static constexpr int32_t kChunk = layout::kSendChunk;
    static constexpr int32_t kNewerGroups = kChunk * Spec::kParts - 1;

    const SendBlock<Spec>& my;
    TokenCursor<Spec> tokens;
    int32_t num_sent = 0;  ///< tokens

    DEEPCOMM_DEVICE explicit ChunkAnnouncer(const TokenCursor<Spec>& sent)
        : my(sent.my), tokens(sent) {}

    DEEPCOMM_DEVICE int32_t* first(int32_t chunk) const {
        return my.smem.chunk_first[my.warp.warp_idx()][chunk % 2];
    }
    DEEPCOMM_DEVICE int32_t* rows(int32_t chunk) const {
        return my.smem.chunk_rows[my.warp.warp_idx()][chunk % 2];
    }

    /// Adds a token whose stores were issued but not yet committed.
    DEEPCOMM_DEVICE void add(const PairSlots& pair) {
        const int32_t chunk = num_sent / kChunk;
        if (num_sent % kChunk == 0) {
            for (int32_t d = my.warp.thread_idx(); d < Spec::kNumRanks; d += my.warp.size()) {
                first(chunk)[d] = rows(chunk)[d] = 0;
            }
            my.warp.sync();  // ORDER: the zeros before the rows that are counted
        }
        if (pair.token_slot >= 0) {  // one lane a rank
            if (rows(chunk)[pair.dst]++ == 0) first(chunk)[pair.dst] = pair.token_slot;
        }
        my.warp.sync();  // ORDER: the counts before other lanes add to them or announce them
        ++num_sent;
        if (num_sent % kChunk != 0 || chunk == 0) return;
        // All newer groups are of this chunk, the last of them open.
        device::bulk_wait_group<kNewerGroups>();  // ORDER: the stores of the chunk before
        announce(chunk - 1);
    }

    /// After the last token: what add has not announced.
    DEEPCOMM_DEVICE void finish() {
        device::bulk_wait_group<0>();  // ORDER: all stores before what announces them
        if (num_sent == 0) return;
        const int32_t last = (num_sent - 1) / kChunk;
        if (last > 0 && num_sent % kChunk != 0) announce(last - 1);
        announce(last);
    }

    DEEPCOMM_DEVICE void announce(int32_t chunk) const {
        my.warp.sync();               // ORDER: the stores of all lanes, with the next line
        device::fence_acq_rel_sys();  // ORDER: they are released by the packets
        const layout::ExchangeLayout& layout = my.params.meet.layout;
        const int32_t chunk_idx = tokens.chunk_of(chunk * kChunk);
        for (int32_t d = my.warp.thread_idx(); d < Spec::kNumRanks; d += my.warp.size()) {
            if (d == my.rank()) continue;
            const device::Vec128 packet = {{static_cast<uint32_t>(first(chunk)[d]),
                                            static_cast<uint32_t>(rows(chunk)[d]), 0, my.epoch}};
            unsigned char* to = my.params.meet.comm.bases[d];
            device::st_relaxed_sys(at<device::Vec128>(to, layout.sent_chunk(my.rank(), chunk_idx)),
                                   packet);
        }
        my.warp.sync();  // ORDER: the counts are read before they start again
    }
};

/// A part of a token: waits for it and issues all its stores.
template <typename Spec>
DEEPCOMM_DEVICE bool send_part(const SendBlock<Spec>& my, typename Spec::Pipe& pipe, int32_t token,
                               const RowPart& part, const PairSlots& pair) {
    const device::WaitSite site = {device::Operation::kDispatch, device::Role::kSend, my.rank(),
                                   token};
    if (!pipe.wait(wait_context(my.params.meet.comm), site)) return false;
    unsigned char* stage = pipe.current();
    prepare_row(my, token, stage);
    send_row(my, part, pair, stage);
    send_beside(my, part, pair, stage);
    if (Spec::kByExpert) {
        const bool is_here =
            pair.dst == my.rank() && pair.pair_slot < my.smem.destinations[my.rank()].limit;
        store_copies(my, part, is_here ? pair.pair_slot : -1, pair.weight, stage);
    }
    return true;
}

/// Adds the lanes' rows to the buffer's counters.
template <typename Spec>
DEEPCOMM_DEVICE void count_rows(const SendBlock<Spec>& my, uint32_t num_local, uint32_t num_peer) {
    num_local = device::warp_sum(num_local);
    num_peer = device::warp_sum(num_peer);
    if (!my.warp.is_leader()) return;
    const uint64_t row_bytes = Spec::kRowBytes + my.scale_bytes();
    device::red_add_relaxed_gpu(&my.params.meet.counters->bytes_local, num_local * row_bytes);
    device::red_add_relaxed_gpu(&my.params.meet.counters->bytes_node, num_peer * row_bytes);
}

/// All tokens of this warp, complete at their destinations; loads has loaded the first rows. False
/// when a wait has run out.
template <typename Spec>
DEEPCOMM_DEVICE bool send_tokens(const SendBlock<Spec>& my, typename Spec::Pipe& pipe,
                                 TokenCursor<Spec>& loads) {
    TokenCursor<Spec> tokens(my, loads.queue, pipe);
    ChunkAnnouncer<Spec> announcer(tokens);
    const int32_t k = my.warp.thread_idx();
    PairSlots pair, next = load_pair<Spec::kByExpert>(my, tokens.token(), k);
    uint32_t num_local = 0, num_peer = 0;  // rows that this lane has stored
    const bool is_complete = move_rows(pipe, loads, [&]() {
        const int32_t token = tokens.token();
        const RowPart part = my.part(tokens.index % Spec::kParts);
        ++tokens.index;
        if (part.is_first()) {
            pair = next;
            next = load_pair<Spec::kByExpert>(
                my, tokens.token_of((tokens.index + Spec::kParts - 1) / Spec::kParts), k);
            name_rank(my, &pair);
            if (Spec::kByExpert) keep_weight(my, token, k, pair);
        }
        if (!send_part(my, pipe, token, part, pair)) return false;
        if (part.index != Spec::kParts - 1) return true;
        if (Spec::kByExpert) announcer.add(pair);
        const bool is_here = pair.dst == my.rank();
        num_local += is_here && (Spec::kByExpert ? pair.pair_slot >= 0 : sends_row(my, pair));
        num_peer += !is_here && sends_row(my, pair);
        return true;
    });
    if (!is_complete) return false;
    count_rows(my, num_local, num_peer);
    if (Spec::kByExpert) {
        announcer.finish();
    } else {
        device::bulk_wait_group<0>();  // ORDER: all stores before the block's arrival
    }
    return true;
}

}  // namespace deepcomm::kernels
