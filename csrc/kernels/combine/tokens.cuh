// SPDX-License-Identifier: Apache-2.0
// Which tokens a warp reduces, and in which order. Inside a node it takes chunks of one origin, whose
// sums are announced together to that origin's rank; elsewhere tokens. PROTOCOLS.md: combine, nodes.
#pragma once

#include "kernels/combine/shared.cuh"

namespace deepcomm::kernels {

/// Where a token stands among those of its origin.
struct TokenPlace {
    int32_t origin;
    int32_t row;
    bool ends_piece;  ///< the last one of what a warp takes at once
};

template <typename Spec>
DEEPCOMM_DEVICE TokenPlace place_of(const CombineBlock<Spec>& my, int32_t token) {
    if (Spec::kStage != kStageInNode) return {0, token, true};
    const int32_t origin = my.origin_of(token);
    const int32_t row = token - my.tokens_from(origin);
    const bool ends_chunk = row % layout::kPushChunk == layout::kPushChunk - 1;
    return {origin, row, ends_chunk || token + 1 == my.tokens_from(origin + 1)};
}

/// Pieces of work. Inside a node chunk 0 of every origin comes first, then chunk 1, and so on, so that all
/// ranks of the rail get theirs all the time; this rank's own, which nobody awaits, are the last ones.
template <typename Spec>
struct TokenPieces {
    const CombineBlock<Spec>& my;
    int32_t end;

    DEEPCOMM_DEVICE explicit TokenPieces(const CombineBlock<Spec>& block)
        : my(block), end(block.num_tokens()) {
        if constexpr (Spec::kStage == kStageInNode) {
            int32_t most = 0;
            for (int32_t origin = 0; origin < Spec::kNumOrigins; ++origin) {
                const int32_t count = my.tokens_from(origin + 1) - my.tokens_from(origin);
                if (count > most) most = count;
            }
            end = (most + layout::kPushChunk - 1) / layout::kPushChunk * Spec::kNumOrigins;
        }
    }

    DEEPCOMM_DEVICE bool is_end(int32_t piece) const { return piece >= end; }

    /// Of a piece before the end; -1 where its origin has no more tokens.
    DEEPCOMM_DEVICE int32_t first_token(int32_t piece) const {
        if (Spec::kStage != kStageInNode) return piece;
        const int32_t step = piece % Spec::kNumOrigins;
        const int32_t origin = (my.own_origin() + 1 + step) % Spec::kNumOrigins;
        const int32_t token =
            my.tokens_from(origin) + piece / Spec::kNumOrigins * layout::kPushChunk;
        return token < my.tokens_from(origin + 1) ? token : -1;
    }

    DEEPCOMM_DEVICE bool is_wanted(int32_t piece) const {
        return is_end(piece) || first_token(piece) >= 0;
    }
};

template <typename Spec>
DEEPCOMM_DEVICE WorkQueue<1> pieces_to_reduce(const CombineBlock<Spec>& my) {
    constexpr int32_t kQueue = Spec::kPushes ? 1 : kQueueBetweenNodes;
    uint32_t* word = my.params.meet.taken + kQueue;
    const int32_t num_blocks = my.block.num_blocks(), w = my.warp.warp_idx();
    if (!my.are_roles_apart()) {
        const int32_t num_others = Spec::kByExpert || !Spec::kPushes ? 0 : Spec::kPushWarps;
        const int32_t num_reducing = Spec::kWarps - num_others;
        return {word, my.block.block_idx() * num_reducing + w - num_others,
                num_blocks * num_reducing};
    }
    const int32_t num_reducing = num_blocks - my.num_pushing();
    const int32_t reducer = (my.block.block_idx() - my.num_pushing()) * Spec::kWarps + w;
    return {word, my.pushes() ? -1 : reducer, num_reducing * Spec::kWarps};
}

/// TOKEN: the tokens of a warp, of which it asks for one ahead.
template <typename Spec>
struct TokenStream {
    const CombineBlock<Spec>& my;
    TokenPieces<Spec> pieces;
    WorkStream stream;

    DEEPCOMM_DEVICE TokenStream(const CombineBlock<Spec>& block, const WorkQueue<1>& queue)
        : my(block), pieces(block), stream(queue) {}

    DEEPCOMM_DEVICE int32_t first(int32_t worker) {
        return first_from(worker < 0 ? stream.next() : worker);
    }
    /// num_tokens() where there are no more.
    DEEPCOMM_DEVICE int32_t after(int32_t token) {
        return place_of(my, token).ends_piece ? first_from(stream.next()) : token + 1;
    }

  private:
    DEEPCOMM_DEVICE int32_t first_from(int32_t piece) {
        while (!pieces.is_wanted(piece)) piece = stream.next();
        return pieces.is_end(piece) ? my.num_tokens() : pieces.first_token(piece);
    }
};

/// Expert layouts: the same for two cursors of a warp.
template <typename Spec, bool kAreSomeEmpty = Spec::kStage == kStageInNode>
struct TokenQueue {
    WorkQueue<1> queue;

    DEEPCOMM_DEVICE int32_t at(int32_t n, const TokenPieces<Spec>&) { return queue.at(n); }
};

template <typename Spec>
struct TokenQueue<Spec, true> {
    FoundPieces<1> queue;

    DEEPCOMM_DEVICE explicit TokenQueue(const WorkQueue<1>& all) : queue(all) {}
    DEEPCOMM_DEVICE int32_t at(int32_t n, const TokenPieces<Spec>& pieces) {
        return queue.at(n, [&](int32_t piece) { return pieces.is_wanted(piece); });
    }
};

}  // namespace deepcomm::kernels
