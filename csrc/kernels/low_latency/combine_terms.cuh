// SPDX-License-Identifier: Apache-2.0
// The sum of what ranks have stored for a token, by a block, part by part, in a fixed order: polls packets
// and adds them in FP32. Which terms there are and where they lie is the caller's. PROTOCOLS.md:
// low_latency_combine.
#pragma once

#include "kernels/low_latency/combine_spec.cuh"

namespace deepcomm::kernels::low_latency {

/// The words of a row's part that belong to the packets of one thread, as FP32.
template <typename Spec>
struct TokenSum {
    static constexpr int kNumThreads = Spec::kNumThreads;
    static constexpr int kAll = Spec::kPacketsOfThread;
    static constexpr int kCount = Spec::kSumPackets;
    using Format = typename Spec::Format;
    using Batch = PacketBatch<Format, kCount>;
    static constexpr int kWords = Format::kWords;

    float low[kCount][kWords];
    float high[kCount][kWords];

    DEEPCOMM_DEVICE void clear() {
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kCount; ++i) {
            DEEPCOMM_UNROLL
            for (int32_t part = 0; part < kWords; ++part) low[i][part] = high[i][part] = 0;
        }
    }

    DEEPCOMM_DEVICE void add_word(int32_t i, int32_t part, uint32_t pair) {
        low[i][part] = device::fadd_rn(low[i][part], device::bf16x2_low(pair));
        high[i][part] = device::fadd_rn(high[i][part], device::bf16x2_high(pair));
    }

    DEEPCOMM_DEVICE void add(const Batch& batch) {
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kCount; ++i) {
            DEEPCOMM_UNROLL
            for (int32_t part = 0; part < kWords; ++part) {
                add_word(i, part, Format::word(batch.packets[i], part));
            }
        }
    }

    /// Adds what lies in shared memory as the thread has staged it.
    DEEPCOMM_DEVICE void add_staged(const uint32_t* staged, int32_t first) {
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kCount; ++i) {
            const int32_t index = first + i * Spec::kNumThreads;
            if (index >= Spec::kPartPackets) continue;
            const Vec128 vector = reinterpret_cast<const Vec128*>(staged)[index];
            DEEPCOMM_UNROLL
            for (int32_t part = 0; part < kWords; ++part) add_word(i, part, vector.words[part]);
        }
    }

    /// Adds the bias, if there is one, and writes the words of packets first, first + threads, ...; of
    /// num_words words of the part, which are whole vectors.
    DEEPCOMM_DEVICE void store(const uint32_t* bias, uint32_t* out, int32_t num_words,
                               int32_t first) {
        if constexpr (Spec::kSendsVectors) return store_vectors(bias, out, num_words, first);
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kCount; ++i) {
            DEEPCOMM_UNROLL
            for (int32_t part = 0; part < kWords; ++part) {
                const int32_t word = (first + i * Spec::kNumThreads) * kWords + part;
                if (word >= num_words) continue;
                if (bias != nullptr) add_word(i, part, bias[word]);
                out[word] = device::bf16x2_from_floats(low[i][part], high[i][part]);
            }
        }
    }

  private:
    DEEPCOMM_DEVICE void store_vectors(const uint32_t* bias, uint32_t* out, int32_t num_words,
                                       int32_t first) {
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kCount; ++i) {
            const int32_t word = (first + i * Spec::kNumThreads) * kWords;
            if (word >= num_words) continue;
            Vec128 vector{};
            if (bias != nullptr) vector = *reinterpret_cast<const Vec128*>(bias + word);
            DEEPCOMM_UNROLL
            for (int32_t part = 0; part < kWords; ++part) {
                if (bias != nullptr) add_word(i, part, vector.words[part]);
                vector.words[part] = device::bf16x2_from_floats(low[i][part], high[i][part]);
            }
            *reinterpret_cast<Vec128*>(out + word) = vector;
        }
    }
};

/// The terms of a token's sum on one node: what its ranks have summed, by rank.
template <bool kKeepsSum>
struct RankTerms {
    static constexpr device::Role kRole = device::Role::kReceive;

    const uint32_t* kept;  ///< this rank's own, where the block has kept it in shared memory

    /// That of a rank, -1 for none.
    DEEPCOMM_DEVICE int32_t of(const LowLatencyParams&, int32_t rank) const { return rank; }
    DEEPCOMM_DEVICE int32_t num(const LowLatencyParams& params) const {
        return params.map.num_ranks;
    }
    /// Who stored a term.
    DEEPCOMM_DEVICE int32_t rank_of(const LowLatencyParams&, int32_t term) const { return term; }
    DEEPCOMM_DEVICE int64_t offset(const LowLatencyParams& params, const LowLatencyTurn& turn,
                                   int32_t term, int32_t token) const {
        return params.map.row_offset(turn.slot, term, token);
    }
    /// A term that is not awaited, or null.
    DEEPCOMM_DEVICE const uint32_t* find_kept(const LowLatencyParams& params, int32_t term) const {
        return kKeepsSum && term == params.comm.rank ? kept : nullptr;
    }
    /// Called before a term is added, and after the last one.
    template <typename Sum>
    DEEPCOMM_DEVICE void come_to(const LowLatencyParams&, int32_t, Sum*) {}
};

/// A row's part that a block sums over its terms.
struct TokenPart {
    int32_t token;
    int32_t part;
};

/// Packets first, first + threads, ... of a part, of two of its terms: loaded together, added in their
/// order.
template <typename Spec>
struct TermPair {
    using Batch = typename TokenSum<Spec>::Batch;

    int32_t terms[2];  ///< ascending; num: none
    Batch batches[2];

    template <typename Terms>
    static DEEPCOMM_DEVICE PacketRange packets_of(const LowLatencyParams& params,
                                                  const LowLatencyTurn& turn, const Terms& of,
                                                  int32_t term, const TokenPart& at) {
        const int64_t offset = of.offset(params, turn, term, at.token);
        Vec128* payload = payload_of(params, packets_at(params.local, offset));
        return {payload + at.part * Spec::kPartPackets, Spec::kNumThreads, Spec::kPartPackets};
    }

    /// The first term of the token after one; mine: that of a lane's column. All lanes call it.
    static DEEPCOMM_DEVICE int32_t term_after(int32_t num, int32_t mine, int32_t term) {
        do ++term;
        DEEPCOMM_NO_UNROLL
        while (term < num && device::warp_ballot(mine == term) == 0);
        return term;
    }

    /// Waits for both and adds them.
    template <typename Terms>
    DEEPCOMM_DEVICE Arrival add_to(const LowLatencyParams& params, const LowLatencyTurn& turn,
                                   Terms& of, const TokenPart& at, int32_t first,
                                   TokenSum<Spec>* sum) {
        Arrival arrival = Arrival::kHere;
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < 2; ++i) {
            if (terms[i] >= of.num(params)) continue;
            if (const uint32_t* kept = of.find_kept(params, terms[i]); kept != nullptr) {
                sum->add_staged(kept, first);
                continue;
            }
            const PacketRange range = packets_of(params, turn, of, terms[i], at);
            const int32_t rank = of.rank_of(params, terms[i]);
            const device::WaitSite site = {Operation::kLowLatencyCombine, Terms::kRole, rank,
                                           at.token};
            const Arrival one = batches[i].wait(params, site, range, first, turn.tag);
            if (one == Arrival::kHere) {
                of.come_to(params, terms[i], sum);
                sum->add(batches[i]);
                batches[i].clear(range, first);
            } else {
                arrival = arrival == Arrival::kFailed ? arrival : one;
                if (one == Arrival::kAbsent) mask_late_peer<Spec::kIsOfNodes>(params, turn, rank);
            }
        }
        return arrival;
    }
};

/// What a block sums, and what of it is on its way.
template <typename Spec, typename Terms>
struct Awaited {
    TokenPart at;
    Terms terms;
    int32_t mine;         ///< the term of a lane's column, or -1
    TermPair<Spec> pair;  ///< the first two terms, of a thread's first packets

    /// The idx-th part, of the rows of all tokens.
    DEEPCOMM_DEVICE void come_to(int32_t idx) {
        at = {idx / Spec::kNumParts, idx % Spec::kNumParts};
    }

    DEEPCOMM_DEVICE void load(const LowLatencyParams& params, const LowLatencyTurn& turn,
                              int32_t first) {
        load_after(params, turn, -1, first);
    }

    /// Finds and loads the two after a term.
    DEEPCOMM_DEVICE void load_after(const LowLatencyParams& params, const LowLatencyTurn& turn,
                                    int32_t term, int32_t first) {
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < 2; ++i) {
            pair.terms[i] = term = pair.term_after(terms.num(params), mine, term);
            const bool is_awaited =
                term < terms.num(params) && terms.find_kept(params, term) == nullptr;
            if (!is_awaited) continue;
            pair.batches[i].load(pair.packets_of(params, turn, terms, term, at), first);
        }
    }
};

/// Sums packets first, first + threads, ... of a part over its terms; the first two are on their way.
template <typename Spec, typename Terms>
DEEPCOMM_DEVICE Arrival sum_terms(const LowLatencyParams& params, const LowLatencyTurn& turn,
                                  Awaited<Spec, Terms>& awaited, int32_t first,
                                  TokenSum<Spec>* sum) {
    TermPair<Spec>& pair = awaited.pair;
    const int32_t num = awaited.terms.num(params);
    Arrival arrival = Arrival::kHere;
    sum->clear();
    DEEPCOMM_NO_UNROLL
    while (pair.terms[0] < num) {
        const Arrival both = pair.add_to(params, turn, awaited.terms, awaited.at, first, sum);
        arrival = arrival == Arrival::kFailed ? arrival : both;
        if (pair.terms[1] >= num) break;
        awaited.load_after(params, turn, pair.terms[1], first);
    }
    awaited.terms.come_to(params, num, sum);
    return arrival;
}

/// The value brought back for a lane's column, 0 where there is none.
template <typename Spec, typename Terms>
DEEPCOMM_DEVICE Arrival wait_carried(const LowLatencyParams& params, const device::Warp& warp,
                                     const LowLatencyTurn& turn,
                                     const Awaited<Spec, Terms>& awaited, float* value) {
    *value = 0;
    const int32_t k = warp.thread_idx(), mine = awaited.mine, token = awaited.at.token;
    if (mine < 0) return Arrival::kHere;
    const auto words = static_cast<int32_t>(layout::kPacketWords);
    const int64_t offset = awaited.terms.offset(params, turn, mine, token);
    const Vec128* head = packets_at(params.local, offset) + k / words;
    const device::WaitSite site = {Operation::kLowLatencyCombine, Terms::kRole,
                                   awaited.terms.rank_of(params, mine), token};
    Vec128 packet{};
    const Arrival arrival = wait_packet(params, site, head, turn.tag, &packet);
    *value = device::float_from_bits(payload_word(packet, k % words));
    return arrival;
}

}  // namespace deepcomm::kernels::low_latency
