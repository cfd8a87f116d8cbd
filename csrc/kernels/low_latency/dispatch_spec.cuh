// SPDX-License-Identifier: Apache-2.0
// What a dispatch kernel is compiled for, what it keeps in shared memory, and the words of its
// headers.
#pragma once

#include "kernels/low_latency/refusal.cuh"

namespace deepcomm::kernels {

/// What a kernel is compiled for. Its receive phase sees only what travels.
template <int kHidden, int kRows, bool kHasNodes, int kThreads>
struct LowLatencyDispatchSpec {
    using Format = typename low_latency::PayloadFormat<kHasNodes>::Type;
    static constexpr auto kKind = static_cast<LowLatencyRows>(kRows);
    static constexpr bool kCasts =
        kKind == LowLatencyRows::kCastFp32 || kKind == LowLatencyRows::kCastUe8m0;
    static constexpr ScaleFormat kScaleFormat =
        kKind == LowLatencyRows::kBf16 ? ScaleFormat::kNone
        : kKind == LowLatencyRows::kFp8Fp32 || kKind == LowLatencyRows::kCastFp32
            ? ScaleFormat::kFp32
            : ScaleFormat::kUe8m0;
    static constexpr int kNumThreads = kThreads;
    /// The last warp has roles of its own: these threads stage and count.
    static constexpr int kStagers = kThreads - device::kWarpSize;
    static constexpr int kNumCounting = kStagers / device::kWarpSize;  ///< warps
    static constexpr int kTiles = static_cast<int>(ceil_div(kHidden, kScaleTile));
    static constexpr int kRowBytes = kScaleFormat == ScaleFormat::kNone ? 2 * kHidden : kHidden;
    static constexpr int kRowWords = kRowBytes / 4;
    static constexpr int kScaleWords = kScaleFormat == ScaleFormat::kNone   ? 0
                                       : kScaleFormat == ScaleFormat::kFp32 ? kTiles
                                                                            : (kTiles + 3) / 4;
    /// Whether scale words travel as halves: four exponents of NaN look like none in a dense packet.
    static constexpr bool kHasHalves =
        Format::kWords == layout::kDenseWords && kScaleFormat == ScaleFormat::kUe8m0;
    static constexpr int kSentWords = kRowWords + kScaleWords * (kHasHalves ? 2 : 1);
    static constexpr int kPackets =
        static_cast<int>(layout::packets_of(kSentWords, Format::kWords));
    static constexpr int kPacketsOfThread = (kPackets + kThreads - 1) / kThreads;
    static constexpr int kStagedWords = static_cast<int>(round_up(
        kHasHalves ? kRowWords + kScaleWords : kPackets * Format::kWords, layout::kVectorWords));
    static constexpr int kInputVectors = (kCasts ? 2 * kHidden : kRowBytes) / 16;
    static constexpr int kRowVectors = kRowBytes / 16;

    static_assert(kHidden <= layout::kMaxLowLatencyHidden, "a row is staged in shared memory");
    static_assert(kRowBytes % 16 == 0, "rows move in 16-byte vectors");
    static_assert(kThreads % 32 == 0 && kThreads >= 64, "the last warp has a role of its own");
};

/// Instead of a destination's index: this rank itself, by the block that has the row staged.
constexpr int32_t kKeptRow = -2;

/// One expert of the token that the block sends or delivers.
struct LowLatencyEntry {
    int32_t dst_idx;  ///< index into destinations, or -1, or kKeptRow
    int32_t local_expert;
    float weight;
};

template <int kHidden, int kRows, int kPhases, int kThreads>
struct LowLatencyDispatchShared {
    static constexpr bool kHasNodes = (kPhases & kOverNodes) != 0;
    /// Whether the row that a block sends last is delivered here as it is staged, by that block.
    static constexpr bool kKeepsRow = (kPhases & kBothPhases) == kBothPhases;
    using Spec = LowLatencyDispatchSpec<kHidden, kRows, kHasNodes, kThreads>;

    /// Room for marks of a word of tokens at least.
    static constexpr int32_t kMarks = Spec::kStagedWords > layout::kMaxLowLatencyExperts
                                          ? Spec::kStagedWords
                                          : static_cast<int32_t>(layout::kMaxLowLatencyExperts);

    union {
        alignas(16) uint32_t row[Spec::kStagedWords];  ///< as it travels: row, then scales
        uint32_t marks[kMarks];                        ///< before: by expert, a bit a token
    };
    low_latency::Peers peers;
    /// Tokens of each expert: sent, [E]; received, [R][L], of each source.
    uint32_t counts[layout::kMaxLowLatencyExperts];
    uint32_t totals[layout::kMaxLowLatencyExperts];         ///< [L]
    uint32_t token_bits[layout::kMaxLowLatencyTokenWords];  ///< [R][ceil(T / 32)]
    int32_t num_tokens[layout::kMaxLowLatencyRanks];
    int32_t destinations[kMaxTopk];
    LowLatencyEntry entries[kMaxTopk];
    /// Tokens before this one that have its k-th expert, as each warp has counted.
    uint32_t counted[Spec::kNumCounting][kMaxTopk];
    int32_t num_destinations;
    int32_t num_copies;
    int32_t slots[kMaxTopk];      ///< of the row's copies
    int64_t scales_at[kMaxTopk];  ///< likewise, where the scales begin, in words
    int32_t columns[kMaxTopk];    ///< likewise, where the token has the expert
    uint32_t refusal;             ///< flags of the header that is sent
    low_latency::Refusals refusals;
};

namespace low_latency {

constexpr uint32_t kNoExpert = 0xFFFFFFFFu;

/// Whether this rank's own copy of a token is not sent: it is the last one of its block, and stays staged.
template <typename Shared>
DEEPCOMM_DEVICE bool keeps_row(const device::Block& block, int32_t token) {
    return Shared::kKeepsRow && token == block.block_idx();
}

/// A packet of the row that is staged in shared memory.
template <typename Spec>
DEEPCOMM_DEVICE Vec128 packet_of(const uint32_t* staged, int32_t index, uint32_t tag) {
    constexpr int32_t kRowPackets = Spec::kRowWords / Spec::Format::kWords;
    if (!Spec::kHasHalves || index < kRowPackets) {
        return Spec::Format::pack(staged + index * Spec::Format::kWords, tag);
    }
    const uint32_t* scales = staged + Spec::kRowWords + (index - kRowPackets) * 2;
    const uint32_t halves[] = {scales[0] & 0xFFFFu, scales[0] >> 16, scales[1] & 0xFFFFu,
                               scales[1] >> 16};
    return Spec::Format::pack(halves, tag);
}

/// Stages what a packet brings.
template <typename Spec>
DEEPCOMM_DEVICE void stage_packet(const Vec128& packet, int32_t index, uint32_t* staged) {
    using Format = typename Spec::Format;
    constexpr int32_t kRowPackets = Spec::kRowWords / Format::kWords;
    if (Spec::kHasHalves && index >= kRowPackets) {
        uint32_t* scales = staged + Spec::kRowWords + (index - kRowPackets) * 2;
        scales[0] = Format::word(packet, 0) | Format::word(packet, 1) << 16;
        scales[1] = Format::word(packet, 2) | Format::word(packet, 3) << 16;
        return;
    }
    uint32_t* words = staged + index * Format::kWords;
    DEEPCOMM_UNROLL
    for (int32_t part = 0; part < Format::kWords; ++part) words[part] = Format::word(packet, part);
}

constexpr int32_t kColumnsAtOnce = 4;  ///< of a token, that instructions are unrolled for

/// The token's place among those of its source for its k-th expert.
template <typename Shared>
DEEPCOMM_DEVICE uint32_t position_of(const Shared& shared, int32_t k) {
    uint32_t position = 0;
    DEEPCOMM_UNROLL
    for (int32_t warp = 0; warp < Shared::Spec::kNumCounting; ++warp) {
        position += shared.counted[warp][k];
    }
    return position;
}

/// The expert of an id, -1 for none as for what is no expert: the header tells of those.
DEEPCOMM_DEVICE int32_t expert_of(const LowLatencyDispatchParams& params, int32_t id) {
    return static_cast<uint32_t>(id) < static_cast<uint32_t>(params.num_experts) ? id : -1;
}

/// Ids that a thread looks at, stride apart; those from num on are none.
struct IdRange {
    int32_t first;
    int32_t stride;
    int32_t num;

    DEEPCOMM_DEVICE int32_t index(int32_t i) const { return first + i * stride; }
};

/// Ids of a range from its first on, or one word of each where they have 64 bits: all loads fly before the first
/// is used.
template <int kCount>
struct IdBatch {
    int32_t ids[kCount];

    /// The low words, which are all that an expert has.
    DEEPCOMM_DEVICE void load(const LowLatencyDispatchParams& params, const IdRange& range) {
        load_words<0>(params, range);
    }

    /// The high words, of ids that have them.
    DEEPCOMM_DEVICE void load_high(const LowLatencyDispatchParams& params, const IdRange& range) {
        load_words<1>(params, range);
    }

  private:
    template <int kWord>
    DEEPCOMM_DEVICE void load_words(const LowLatencyDispatchParams& params, const IdRange& range) {
        const auto* words = static_cast<const int32_t*>(params.topk_idx);
        // Who asks for high words knows that there are two of each.
        const int32_t shift = kWord == 1 ? 1 : params.topk_idx_is_int64;
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kCount; ++i) {
            const int32_t index = range.index(i);
            ids[i] = index < range.num ? words[(index << shift) + kWord] : -1;
        }
    }
};

}  // namespace low_latency

}  // namespace deepcomm::kernels
