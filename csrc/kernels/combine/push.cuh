// SPDX-License-Identifier: Apache-2.0
// Role push: rows that came from peers go back to them, in the order in which they came. TOKEN: copied.
// PROTOCOLS.md: combine.
#pragma once

#include "kernels/combine/shared.cuh"

namespace deepcomm::kernels {

/// The chunks of one warp, in its order: all blocks of peers in turn, beginning with the rank after
/// this one.
template <typename Spec>
struct PushCursor {
    static constexpr int32_t kNumPeers = Spec::kNumRanks - 1;
    static constexpr int32_t kNumBlocks = Spec::kRowOrigins * kNumPeers;
    using Queue = FoundPieces<1>;

    const CombineBlock<Spec>& my;
    Queue& queue;       ///< pieces over all blocks: chunk * blocks + step
    int32_t end_chunk;  ///< of the longest block
    int32_t taken = 0;  ///< pieces that have rows
    int32_t block = 0;  ///< of a peer: layout/plan.hpp
    int32_t chunk = 0;
    int32_t row = 0;  ///< in the block
    int32_t end = 0;  ///< of the chunk at hand

    DEEPCOMM_DEVICE PushCursor(const CombineBlock<Spec>& mine, Queue& pieces)
        : my(mine), queue(pieces) {
        int32_t most_rows = 0;
        for (int32_t step = 0; step < kNumBlocks; ++step) {
            const int32_t num_rows = my.num_rows_of(block_of(step));
            if (num_rows > most_rows) most_rows = num_rows;
        }
        end_chunk = (most_rows + layout::kPushChunk - 1) / layout::kPushChunk;
    }

    DEEPCOMM_DEVICE static Queue queue_of(const CombineBlock<Spec>& my) {
        const int32_t num_blocks = my.are_roles_apart() ? my.num_pushing() : my.block.num_blocks();
        const int32_t worker = my.block.block_idx() * Spec::kPushWarps + my.warp.warp_idx();
        return Queue({my.params.meet.taken, worker, num_blocks * Spec::kPushWarps});
    }
    DEEPCOMM_DEVICE int32_t block_of(int32_t step) const {
        return step / kNumPeers * Spec::kNumRanks +
               (my.rank() + 1 + step % kNumPeers) % Spec::kNumRanks;
    }

    DEEPCOMM_DEVICE bool is_alive() const { return true; }
    DEEPCOMM_DEVICE int32_t peer() const {
        return Spec::kRowOrigins == 1 ? block : block % Spec::kNumRanks;
    }

    DEEPCOMM_DEVICE bool is_end(int32_t piece) const { return piece / kNumBlocks >= end_chunk; }

    /// Moves to the next chunk that has rows; false when there is none.
    DEEPCOMM_DEVICE bool open_chunk() {
        if constexpr (kNumPeers == 0) {
            return false;
        } else {
            const int32_t piece = queue.at(taken, [&](int32_t other) {
                const int32_t begin = other / kNumBlocks * layout::kPushChunk;
                return is_end(other) || begin < my.num_rows_of(block_of(other % kNumBlocks));
            });
            if (is_end(piece)) return false;
            ++taken;
            block = block_of(piece % kNumBlocks);
            chunk = piece / kNumBlocks;
            row = chunk * layout::kPushChunk;
            const int32_t num_rows = my.num_rows_of(block);
            end = row + layout::kPushChunk < num_rows ? row + layout::kPushChunk : num_rows;
            return true;
        }
    }
    DEEPCOMM_DEVICE bool next(RowPiece* piece) {
        if (row == end && !open_chunk()) return false;
        piece->row = my.output_row(my.rows_from(block) + row);
        ++row;
        return true;
    }
};

/// The weights of the row at hand that are carried back, a lane a pair.
template <typename Spec>
DEEPCOMM_DEVICE void push_carried(const CombineBlock<Spec>& my, const PushCursor<Spec>& rows,
                                  int32_t slot) {
    const int32_t k = my.warp.thread_idx();
    if (my.params.outputs.carried == nullptr || k >= my.params.num_topk) return;
    float value = 0;
    if (!Spec::kByExpert) {
        const int64_t here = my.rows_from(rows.block) + rows.row;
        value = my.params.outputs.carried[here * my.params.num_topk + k];
    } else if (slot >= 0) {
        value = my.params.outputs.carried[slot];
    }
    my.pushed_weights(rows.peer(), my.push_base(rows.block) + rows.row)[k] = value;
}

/// A chunk of a block. A rank's block of an origin here is that of this rank there.
struct PushedChunk {
    int32_t block;
    int32_t chunk;
};

constexpr PushedChunk kNothingPushed = {-1, 0};

template <typename Spec>
DEEPCOMM_DEVICE void announce_pushed(const CombineBlock<Spec>& my, const PushedChunk& pushed) {
    const int32_t peer = pushed.block % Spec::kNumRanks;
    const int32_t block = pushed.block - peer + my.rank();
    announce(my, my.pushed_word(peer, block, pushed.chunk));
}

/// TOKEN: bulk copies; a chunk is announced when the stores of the next one have been issued.
template <typename Spec>
DEEPCOMM_DEVICE bool push_rows(const CombineBlock<Spec>& my, typename Spec::Pipe& pipe) {
    auto queue = PushCursor<Spec>::queue_of(my);
    PushCursor<Spec> loads(my, queue);
    PushCursor<Spec> rows(my, queue);
    PushedChunk last = kNothingPushed;
    const bool is_complete = move_rows(pipe, loads, [&]() {
        if (rows.row == rows.end && !rows.open_chunk()) return false;
        const device::WaitSite site = {device::Operation::kCombine, device::Role::kSend,
                                       rows.peer(), rows.row};
        if (!pipe.wait(wait_context(my.params.meet.comm), site)) return false;
        if (my.warp.is_leader()) {
            device::bulk_store(my.pushed_row(rows.peer(), my.push_base(rows.block) + rows.row),
                               pipe.current(), Spec::kRowBytes);
        }
        push_carried(my, rows, -1);
        ++rows.row;
        if (rows.row != rows.end) return true;
        if (last.block >= 0) {
            // All newer groups are of this chunk, whose last row is in the open one.
            if (rows.end % layout::kPushChunk == 0) {
                device::bulk_wait_group<layout::kPushChunk - 1>();  // ORDER: the chunk before
            } else {
                device::bulk_wait_group<0>();  // ORDER: likewise, after a chunk of fewer rows
            }
            announce_pushed(my, last);
        }
        last = {rows.block, rows.chunk};
        return true;
    });
    device::bulk_wait_group<0>();  // ORDER: all stores before the last announcement
    if (!is_complete) return false;
    if (last.block >= 0) announce_pushed(my, last);
    return true;
}

}  // namespace deepcomm::kernels
