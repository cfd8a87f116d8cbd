// SPDX-License-Identifier: Apache-2.0
// Expert layouts: rows come through the warp's stages, a part of several terms at a time, and are summed
// there. A warp first pushes to the peers what it sums over this rank's experts, then reduces tokens.
// PROTOCOLS.md: combine.
#pragma once

#include "kernels/combine/push.cuh"
#include "kernels/combine/reduce.cuh"

namespace deepcomm::kernels {

/// One row to sum: lane j holds its term number j, in the order of addition.
struct SumUnit {
    int32_t count;  ///< terms
    const unsigned char* row;
    float weight;
    uint32_t own;  ///< bit j: term j is a row of this rank's experts, and not of a peer
};

/// Brings the lanes' terms into their order.
DEEPCOMM_DEVICE SumUnit sorted(const Term& term, bool is_own) {
    const TermOrder order = order_terms(term.key);
    const int32_t lane = device::Warp{}.thread_idx();
    int32_t from = lane;
    for (int32_t j = 0; j < order.count; ++j) {
        const int32_t holder = device::lowest_bit(device::warp_ballot(order.position == j));
        if (lane == j) from = holder;
    }
    const uint64_t bits = device::warp_shuffle(reinterpret_cast<uint64_t>(term.row), from);
    const bool comes_from_here = device::warp_shuffle(static_cast<int32_t>(is_own), from) != 0;
    return {order.count, reinterpret_cast<const unsigned char*>(bits),
            device::warp_shuffle(term.weight, from),
            device::warp_ballot(lane < order.count && comes_from_here)};
}

/// The rows that are pushed, one after the other.
template <typename Spec>
struct PushedSums {
    static constexpr bool kHasPeers = false;  ///< whether rows of peers are added

    const CombineBlock<Spec>& my;
    PushCursor<Spec> rows;

    DEEPCOMM_DEVICE PushedSums(const CombineBlock<Spec>& block,
                               typename PushCursor<Spec>::Queue& queue)
        : my(block), rows(block, queue) {}

    DEEPCOMM_DEVICE bool await() const { return true; }

    /// Of this lane's pair.
    DEEPCOMM_DEVICE int64_t pair_index() const {
        const int64_t row = my.rows_from(rows.block) + rows.row;
        return row * my.params.num_topk + my.warp.thread_idx();
    }
    DEEPCOMM_DEVICE int32_t slot() const {
        const bool is_pair = my.warp.thread_idx() < my.params.num_topk;
        return is_pair ? my.params.outputs.row_slots[pair_index()] : -1;
    }

    /// Moves to the next row; false when there is none.
    DEEPCOMM_DEVICE bool next(SumUnit* unit) {
        if (rows.row != rows.end) ++rows.row;
        if (rows.row == rows.end && !rows.open_chunk()) return false;
        Term term = {nullptr, slot(), 1.0f};
        if (term.key >= 0) {
            term.row = my.output_row(term.key);
            const float* weights = my.params.outputs.row_weights;
            if (weights != nullptr) term.weight = weights[pair_index()];
        }
        *unit = sorted(term, true);
        return true;
    }

    DEEPCOMM_DEVICE void carry() const {
        if (my.params.outputs.carried != nullptr) push_carried(my, rows, slot());
    }

    DEEPCOMM_DEVICE SumTarget target() const {
        return {my.pushed_row(rows.peer(), my.push_base(rows.block) + rows.row), nullptr, nullptr,
                false};
    }

    /// The peers hear of a chunk once it is complete.
    DEEPCOMM_DEVICE void end() const {
        if (rows.row + 1 == rows.end) announce_pushed(my, {rows.block, rows.chunk});
    }
};

/// The tokens that are reduced, one after the other.
template <typename Spec>
struct ReducedTokens {
    static constexpr bool kHasPeers = true;

    const CombineBlock<Spec>& my;
    TokenQueue<Spec>& queue;
    TokenPieces<Spec> pieces;
    int32_t num_taken = 0;
    int32_t token = -1;
    bool is_lost = false;
    ReducePair pair{};

    DEEPCOMM_DEVICE ReducedTokens(const CombineBlock<Spec>& block, TokenQueue<Spec>& tokens)
        : my(block), queue(tokens), pieces(block) {}

    DEEPCOMM_DEVICE bool next(SumUnit* unit) {
        if (token < 0 || place_of(my, token).ends_piece) {
            const int32_t piece = queue.at(num_taken, pieces);
            if (pieces.is_end(piece)) return false;
            ++num_taken;
            token = pieces.first_token(piece);
        } else {
            ++token;
        }
        pair = load_pair(my, token);
        is_lost = device::warp_ballot(pair.is_lost) != 0;
        *unit = sorted(pair.term, pair.slot >= 0);
        if (is_lost) unit->count = 0;
        return true;
    }

    /// By who loads: until the peers' rows are here, and may be loaded.
    DEEPCOMM_DEVICE bool await() const {
        if (!await_rows(my, pair)) return false;
        device::fence_proxy_async();  // ORDER: what the peers stored before the bulk loads of it
        return true;
    }

    DEEPCOMM_DEVICE void carry() const { bring_weights(my, pair, token); }

    DEEPCOMM_DEVICE SumTarget target() const { return sum_target(my, token, is_lost); }
    DEEPCOMM_DEVICE void end() const { announce_sum(my, token); }
};

/// What is loaded: ahead of what is summed, but never so far that the queue forgets.
template <typename Spec, typename Units>
struct TermLoads {
    static constexpr int32_t kMostAhead = device::kWarpSize / 2;  ///< units

    Units units;
    SumUnit unit{};
    int32_t num_ahead = 0;  ///< units that are not yet summed; told by who sums
    int32_t part = Spec::kNumParts;
    int32_t term = 0;

    DEEPCOMM_DEVICE explicit TermLoads(const Units& first) : units(first) {}

    /// Loads terms for as long as there are any, and room. False when a rank did not come.
    DEEPCOMM_DEVICE bool run(typename Spec::Pipe& pipe) {
        while (true) {
            run_in_unit(pipe);
            if (!pipe.may_load()) return true;
            if (num_ahead == kMostAhead || !units.next(&unit)) return true;
            ++num_ahead;
            if (!units.await()) return false;
            part = unit.count == 0 ? Spec::kNumParts : 0;
        }
    }

    /// The same within the unit at hand. Between the rounds of a part: sums leave no registers for more.
    DEEPCOMM_DEVICE void run_in_unit(typename Spec::Pipe& pipe) {
        while (part != Spec::kNumParts && pipe.may_load()) {
            pipe.load_with([&](unsigned char* stage, device::Mbarrier* full) {
                return load_terms(stage, full);
            });
            term += Spec::kTermsAtOnce;
            if (term < unit.count) continue;
            term = 0;
            ++part;
        }
    }

    /// A lane a term. Returns how many bytes will arrive.
    DEEPCOMM_DEVICE uint32_t load_terms(unsigned char* stage, device::Mbarrier* full) const {
        const uint32_t num_bytes = Spec::vectors_of(part) * sizeof(device::Vec128);
        const int32_t lane = device::Warp{}.thread_idx();
        const int32_t end = Spec::end_of_round(term, unit.count);
        if (lane >= term && lane < end) {
            device::bulk_load(stage + (lane - term) * Spec::kPieceBytes,
                              unit.row + part * Spec::kPieceBytes, num_bytes, full);
        }
        device::Warp{}.sync();  // ORDER: all lanes' copies before the arrival that expects them
        return static_cast<uint32_t>(end - term) * num_bytes;
    }
};

/// A lane's share of one part of a row, in FP32.
struct PartSum {
    Floats8 own[kPieceUnroll];    ///< rows of this rank, weighted
    Floats8 total[kPieceUnroll];  ///< rows of ranks
};

/// Calls visit(i, channels) for this lane's share of one term, in its place in a stage.
template <typename Visit>
DEEPCOMM_DEVICE void for_each_vector(const unsigned char* piece, int32_t num_vectors,
                                     Visit&& visit) {
    const auto* vectors = reinterpret_cast<const device::Vec128*>(piece);
    DEEPCOMM_UNROLL
    for (int32_t i = 0; i < kPieceUnroll; ++i) {
        const int32_t index = device::Warp{}.thread_idx() + i * device::kWarpSize;
        if (index < num_vectors) visit(i, floats_of(vectors[index]));
    }
}

/// Adds terms [begin, end) of a unit from their stage.
template <typename Spec, typename Units>
DEEPCOMM_DEVICE void add_terms(const unsigned char* stage, const SumUnit& unit, int32_t begin,
                               int32_t num_vectors, PartSum* sum) {
    for (int32_t j = begin; j < Spec::end_of_round(begin, unit.count); ++j) {
        const unsigned char* piece = stage + (j - begin) * Spec::kPieceBytes;
        if (Units::kHasPeers && (unit.own >> j & 1) == 0) {
            for_each_vector(piece, num_vectors, [&](int32_t i, const Floats8& channels) {
                add_to(&sum->total[i], channels);
            });
            continue;
        }
        const float weight = device::warp_shuffle(unit.weight, j);
        for_each_vector(piece, num_vectors, [&](int32_t i, Floats8 channels) {
            scale_by(&channels, weight);
            add_to(&sum->own[i], channels);
        });
        // They are neighbours. Their sum is rounded like one that travels.
        if (!Units::kHasPeers || unit.own >> j != 1) continue;
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kPieceUnroll; ++i) {
            add_to(&sum->total[i], floats_of(bf16_of(sum->own[i])));
        }
    }
}

/// Sums one part of a unit while the next terms are loaded. False when a wait has run out.
template <typename Spec, typename Units>
DEEPCOMM_DEVICE bool sum_part(const CombineBlock<Spec>& my, typename Spec::Pipe& pipe,
                              TermLoads<Spec, Units>& loads, const SumUnit& unit, int32_t part,
                              PartSum* sum) {
    const device::WaitSite site = {device::Operation::kCombine, device::Role::kSend, my.rank()};
    for (int32_t begin = 0; begin < unit.count; begin += Spec::kTermsAtOnce) {
        if (!pipe.wait(wait_context(my.params.meet.comm), site)) return false;
        add_terms<Spec, Units>(pipe.current(), unit, begin, Spec::vectors_of(part), sum);
        pipe.advance();
        loads.run_in_unit(pipe);
    }
    return true;
}

/// Sums all units of this warp. False when a wait has run out; nothing is in flight then.
template <typename Spec, typename Units>
DEEPCOMM_DEVICE bool sum_units(const CombineBlock<Spec>& my, typename Spec::Pipe& pipe,
                               Units units) {
    TermLoads<Spec, Units> loads(units);
    SumUnit unit{};
    for (; units.next(&unit); --loads.num_ahead) {
        for (int32_t part = 0; part < Spec::kNumParts; ++part) {
            bool is_complete = loads.run(pipe);
            if (part == 0 && is_complete) units.carry();  // what the loads have waited for is here
            PartSum sum = {};
            is_complete = is_complete && sum_part(my, pipe, loads, unit, part, &sum);
            if (!is_complete) {
                pipe.drain();
                return false;
            }
            const int32_t first = part * Spec::kPieceVectors + my.warp.thread_idx();
            store_sum<Spec::kRowVectors>(Units::kHasPeers ? sum.total : sum.own, units.target(),
                                         first);
        }
        units.end();
    }
    return true;
}

/// Pushes, then reduces: a peer waits for what is pushed, and nothing that is pushed waits for a peer.
template <typename Spec>
DEEPCOMM_DEVICE bool sum_by_experts(const CombineBlock<Spec>& my, typename Spec::Pipe& pipe) {
    auto chunks = PushCursor<Spec>::queue_of(my);
    if (!sum_units(my, pipe, PushedSums<Spec>(my, chunks))) return false;
    TokenQueue<Spec> tokens{pieces_to_reduce(my)};
    return sum_units(my, pipe, ReducedTokens<Spec>(my, tokens));
}

}  // namespace deepcomm::kernels
