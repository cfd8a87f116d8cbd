// SPDX-License-Identifier: Apache-2.0
// The parts of tokens that a block of a combine sums, one after the other, and which rows of experts they
// are of. PROTOCOLS.md: low_latency_combine.
#pragma once

#include "kernels/low_latency/combine_sum.cuh"
#include "kernels/low_latency/pair_cursor.cuh"

namespace deepcomm::kernels::low_latency {

/// One part of one token of one source, to be summed here.
struct Summed {
    int32_t source;
    int32_t token;
    int32_t part;
};

/// Entry i of a token and the weight recorded for it, in lane i.
struct Entry {
    int32_t bits;  ///< or kNoEntry
    float weight;
};

/// Nothing here waits for the loads.
DEEPCOMM_DEVICE Entry load_entry(const LowLatencyCombineParams& params, const device::Warp& warp,
                                 const Summed& summed) {
    const LowLatencyParams& base = params.base;
    const int32_t lane = warp.thread_idx(), num_topk = base.num_topk;
    Entry entry = {layout::kNoEntry, 1.0f};
    if (lane >= num_topk) return entry;
    const int64_t index =
        (static_cast<int64_t>(summed.source) * base.map.max_tokens + summed.token) * num_topk +
        lane;
    entry.bits = base.record[base.record_map.entries + index];
    if (params.apply_weights && params.source_weights == nullptr) {
        entry.weight = device::float_from_bits(
            static_cast<uint32_t>(base.record[base.record_map.weights + index]));
    }
    return entry;
}

/// All lanes call it.
template <typename Spec>
DEEPCOMM_DEVICE ExpertRows rows_of(const LowLatencyCombineParams& params, const Entry& entry,
                                   int32_t part) {
    const bool is_row = entry.bits >= 0;
    ExpertRow mine = {nullptr, 1.0f, 0};
    if (is_row) {
        const int32_t slot = entry.bits & ((1 << layout::kEntrySlotBits) - 1);
        const unsigned char* row = params.y + slot * params.y_stride;
        mine = {row + part * Spec::kPartWords * 4, entry.weight,
                entry.bits >> layout::kEntrySlotBits};
    }
    return {mine, device::popcount(device::warp_ballot(is_row)), Spec::num_vectors(part)};
}

/// The part of this rank's own rows that a block keeps, if there is one: what it receives first.
template <typename Spec>
DEEPCOMM_DEVICE Summed kept_of(const LowLatencyParams& params, const device::Block& block) {
    return {params.comm.rank, block.block_idx() / Spec::kNumParts,
            block.block_idx() % Spec::kNumParts};
}

/// Whether a part is what its block receives first, which then keeps the sum of this rank's own rows.
template <typename Shared>
DEEPCOMM_DEVICE bool is_kept(const LowLatencyParams& params, const device::Block& block,
                             const Summed& summed) {
    return Shared::kKeepsSum && summed.source == params.comm.rank &&
           summed.token * Shared::Spec::kNumParts + summed.part < block.num_blocks();
}

/// Whether there is such a token, of a source that takes part.
template <typename Shared>
DEEPCOMM_DEVICE bool takes_part(Shared& shared, const Summed& summed) {
    return summed.token < shared.num_tokens[summed.source] && !cut_sources(shared)[summed.source];
}

/// A block's way through what is summed; most: tokens of any source.
template <typename Spec>
DEEPCOMM_DEVICE PairCursor summed_cursor(const device::Block& block, int32_t most) {
    return {most * Spec::kNumParts, block.block_idx()};
}

/// Where it is: tokens of the peers come first, which have the longer way, each part by part.
template <typename Spec>
DEEPCOMM_DEVICE Summed summed_at(const LowLatencyParams& params, const PairCursor& cursor) {
    return {cursor.rank(params, params.comm.rank + 1), cursor.item / Spec::kNumParts,
            cursor.item % Spec::kNumParts};
}

/// What the block probably sums first: ranks have the same number of tokens, as a rule.
template <typename Spec>
DEEPCOMM_DEVICE Summed guess_summed(const LowLatencyParams& params, const device::Block& block) {
    PairCursor cursor = summed_cursor<Spec>(block, params.num_tokens);
    return cursor.find(params) ? summed_at<Spec>(params, cursor) : Summed{0, -1, 0};
}

/// The entry of that, unless nobody has written what is there: the record has no such token, or is of a launch
/// that may have failed. All lanes call it.
DEEPCOMM_DEVICE Entry guess_entry(const LowLatencyCombineParams& params, const device::Warp& warp,
                                  const Summed& guess, bool has_failed) {
    Entry entry = {layout::kNoEntry, 1.0f};
    if (guess.token < 0) return entry;
    const LowLatencyParams& base = params.base;
    const int32_t num_tokens = base.record[base.record_map.num_tokens + guess.source];
    entry = load_entry(params, warp, guess);
    if (has_failed || guess.token >= num_tokens) entry.bits = layout::kNoEntry;
    return entry;
}

/// The entry of the part that the block keeps.
template <typename Shared>
DEEPCOMM_DEVICE Entry kept_entry(const LowLatencyCombineParams& params,
                                 const device::Block& block) {
    const device::Warp warp;
    const Summed own = kept_of<typename Shared::Spec>(params.base, block);
    const bool is_there = Shared::kKeepsSum && warp.warp_idx() == 0;
    if (!is_there || own.token >= params.base.num_tokens) return {layout::kNoEntry, 1.0f};
    return load_entry(params, warp, own);
}

/// The parts of tokens that a block sums, one after the other.
template <typename Shared>
struct SummedWalk {
    using Spec = typename Shared::Spec;

    const LowLatencyCombineParams& params;
    Shared& shared;
    Summed summed;     ///< the part to come
    Entry entry = {};  ///< of its token
    bool has_part;
    bool has_ended = false;
    PairCursor cursor = {0, 0};

    /// Is where it probably begins, until it does.
    DEEPCOMM_DEVICE SummedWalk(const LowLatencyCombineParams& of, const Summed& guess, Shared& in)
        : params(of), shared(in), summed(guess), has_part(guess.token >= 0) {}

    /// False: a launch before has failed.
    DEEPCOMM_DEVICE bool load_guess() {
        const bool has_failed = device::ld_relaxed_gpu(params.base.comm.failed) != 0;
        entry = guess_entry(params, device::Warp{}, summed, has_failed);
        return !has_failed;
    }

    /// Comes to the next part, whose entry is not loaded yet.
    DEEPCOMM_DEVICE void advance(const device::Block& block) {
        has_part = false;
        while (!has_part && cursor.find(params.base)) {
            summed = summed_at<Spec>(params.base, cursor);
            cursor.item += block.num_blocks();
            has_part = takes_part(shared, summed) && !is_kept<Shared>(params.base, block, summed);
        }
        if (has_part || has_ended || !Shared::kKeepsSum) return;
        has_ended = true;  // but for what the block keeps
        summed = kept_of<Spec>(params.base, block);
        has_part = takes_part(shared, summed);
    }

    DEEPCOMM_DEVICE void load() {
        const device::Warp warp;
        const int32_t lane = warp.thread_idx();
        entry = has_ended ? Entry{shared.kept_entries[lane], shared.kept_weights[lane]}
                          : load_entry(params, warp, summed);
    }

    /// Begins; whether that is where it was.
    DEEPCOMM_DEVICE bool begin(const device::Block& block) {
        const Summed guess = summed;
        cursor = summed_cursor<Spec>(block, most_tokens(params.base, shared));
        advance(block);
        const bool is_token = summed.source == guess.source && summed.token == guess.token;
        if (has_part && !is_token) load();
        return has_part && !has_ended && is_token && summed.part == guess.part;
    }
};

}  // namespace deepcomm::kernels::low_latency
