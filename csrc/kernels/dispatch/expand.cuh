// SPDX-License-Identifier: Apache-2.0
// Role expand (expert layouts): rows that have landed are read once and stored to the slots of
// their local experts, chunk by chunk as the sources announce them. PROTOCOLS.md: dispatch_send.
#pragma once

#include "kernels/dispatch/send.cuh"

namespace deepcomm::kernels {

/// The landed rows of one warp, in its order: chunks of each source in turn, beginning with the rank
/// after this one.
template <typename Spec>
struct LandedCursor {
    using Queue = FoundPieces<1>;

    const SendBlock<Spec>& my;
    Queue& queue;
    int32_t num_chunks = 0;  ///< that had rows
    int32_t row = 0;
    int32_t end = 0;  ///< rows of the chunk at hand are [row, end)
    bool has_failed = false;

    DEEPCOMM_DEVICE LandedCursor(const SendBlock<Spec>& block, Queue& chunks)
        : my(block), queue(chunks) {}

    DEEPCOMM_DEVICE bool is_alive() const { return !has_failed; }

    /// Waits for the announcement of a chunk.
    DEEPCOMM_DEVICE bool open_chunk(int32_t src, int32_t chunk) {
        const CommParams& comm = my.params.meet.comm;
        const device::WaitSite site = {device::Operation::kDispatch, device::Role::kForward, src,
                                       chunk};
        const auto* address = at<const device::Vec128>(
            comm.bases[my.rank()], my.params.meet.layout.sent_chunk(src, chunk));
        device::Vec128 packet{};
        const bool is_there = await_packet(wait_context(comm), site, address, my.epoch, &packet);
        device::fence_acq_rel_sys();  // ORDER: acquires what the packet announces
        // ORDER: landed rows are read by bulk loads; pairs with the fence of their announcer
        device::fence_proxy_async();
        has_failed = !my.warp.sync_and(is_there);
        row = static_cast<int32_t>(packet.words[0]);
        end = row + static_cast<int32_t>(packet.words[1]);
        return !has_failed;
    }

    /// Where a piece of the queue lies; false beyond the last.
    DEEPCOMM_DEVICE bool locate(int32_t piece, int32_t* src, int32_t* chunk) const {
        *chunk = piece;
        for (int32_t step = 1; step < Spec::kNumRanks; ++step) {
            *src = (my.rank() + step) % Spec::kNumRanks;
            const int32_t num_tokens = my.smem.meet.headers[*src].num_tokens;
            const int32_t num_here = (num_tokens + layout::kSendChunk - 1) / layout::kSendChunk;
            if (*chunk < num_here) return true;
            *chunk -= num_here;
        }
        return false;
    }

    /// Moves to the next row; false when there is none, or when a source did not come.
    DEEPCOMM_DEVICE bool find_row() {
        if (row != end) return true;
        int32_t src = 0, chunk = 0;
        const int32_t piece = queue.at(num_chunks, [&](int32_t other) {
            return !locate(other, &src, &chunk) || !open_chunk(src, chunk) || row != end;
        });
        if (has_failed || !locate(piece, &src, &chunk)) return false;
        if (row == end && !open_chunk(src, chunk)) return false;  // another cursor has found it
        ++num_chunks;
        return true;
    }

    DEEPCOMM_DEVICE bool next(RowPiece* piece) {
        if (!find_row()) return false;
        piece->row = my.here().rows + static_cast<int64_t>(row) * Spec::kRowBytes;
        if (Spec::kWire != kWireBf16 && my.has_bulk_scales()) {
            piece->scales = my.here().scales + static_cast<int64_t>(row) * my.scale_bytes();
            piece->scale_bytes = my.scale_bytes();
        }
        ++row;
        return true;
    }
};

/// Scales that bulk copies cannot move come by plain loads.
template <typename Spec>
DEEPCOMM_DEVICE void load_landed_scales(const SendBlock<Spec>& my, int32_t row,
                                        unsigned char* stage) {
    if (Spec::kWire == kWireBf16 || my.has_bulk_scales()) return;
    const auto* from =
        at<const uint32_t>(my.here().scales, static_cast<int64_t>(row) * my.scale_bytes());
    copy_words(reinterpret_cast<uint32_t*>(stage + Spec::kScalesAt), from, my.params.scale_words);
    my.warp.sync();  // ORDER: the scales before other lanes read them
}

/// One landed row: its slots go to the handle, its copies to their places.
template <typename Spec>
DEEPCOMM_DEVICE bool expand_row(const SendBlock<Spec>& my, typename Spec::LandedPipe& pipe,
                                int32_t row) {
    const int32_t k = my.warp.thread_idx();
    const bool is_pair = k < my.params.num_topk;
    const int64_t index = static_cast<int64_t>(row) * my.params.num_topk + k;
    int32_t copy = -1;
    float weight = 0;
    if (is_pair) {
        copy = my.here().slots[index];
        if (my.params.topk_weights != nullptr) {
            weight = my.here().topk_weights[index];
            my.params.target.row_weights[index] = weight;
        }
        my.params.target.row_slots[index] = copy;
    }
    const device::WaitSite site = {device::Operation::kDispatch, device::Role::kForward, my.rank(),
                                   row};
    if (!pipe.wait(wait_context(my.params.meet.comm), site)) return false;
    load_landed_scales(my, row, pipe.current());
    store_copies(my, my.whole_row(), copy, weight, pipe.current());
    return true;
}

/// All rows of this warp. False when a wait has run out.
template <typename Spec>
DEEPCOMM_DEVICE bool expand_rows(const SendBlock<Spec>& my, typename Spec::LandedPipe& pipe) {
    typename LandedCursor<Spec>::Queue queue(
        {my.params.meet.taken + 1, my.worker(), my.num_workers()});
    LandedCursor<Spec> loads(my, queue);
    LandedCursor<Spec> rows(my, queue);
    const bool is_complete = move_rows(pipe, loads, [&]() {
        if (!rows.find_row()) return false;
        return expand_row(my, pipe, rows.row++);
    });
    device::bulk_wait_group<0>();  // ORDER: the copies are complete when the kernel ends
    return is_complete;
}

}  // namespace deepcomm::kernels
