// SPDX-License-Identifier: Apache-2.0
// Role: a block sends tokens. It counts where the token's copies will lie and casts the row into
// shared memory, while its last warp finds the destinations and their credits, and then stores
// packets to every destination at once. PROTOCOLS.md: low_latency_dispatch.
#pragma once

#include "kernels/low_latency/dispatch_header.cuh"
#include "kernels/rows/cast.cuh"

namespace deepcomm::kernels::low_latency {

/// Casts 8 channels of a lane; the lanes of a tile agree on its scale. All lanes call it.
template <typename Shared>
DEEPCOMM_DEVICE void cast_vector(const Vec128& input, int32_t vector, Shared& shared) {
    using Spec = typename Shared::Spec;
    constexpr bool kIsFp32 = Spec::kScaleFormat == ScaleFormat::kFp32;
    const uint32_t amax = tile_amax(input);
    if (vector >= Spec::kInputVectors) return;
    const device::TileScale scale =
        kIsFp32 ? device::fp32_tile_scale(amax) : device::ue8m0_tile_scale(amax);
    reinterpret_cast<Fp8x8*>(shared.row)[vector] = cast_eight(input, scale.inverse);
    if (vector % kLanesPerTile != 0) return;
    uint32_t* scales = shared.row + Spec::kRowWords;
    const int32_t tile = vector / kLanesPerTile;
    if constexpr (kIsFp32) {
        scales[tile] = scale.stored;
    } else {
        reinterpret_cast<uint8_t*>(scales)[tile] = static_cast<uint8_t>(scale.stored);
    }
}

/// The vectors of a row that a thread stages: loaded early, used late.
template <typename Shared>
struct RowInput {
    using Spec = typename Shared::Spec;
    static constexpr int kAll = (Spec::kInputVectors + Spec::kNumThreads - 1) / Spec::kNumThreads;
    static constexpr int kCount = kAll < 4 ? kAll : 4;  ///< in flight at once

    Vec128 vectors[kCount];

    DEEPCOMM_DEVICE void load(const unsigned char* row, int32_t first) {
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kCount; ++i) {
            const int32_t vector = first + i * Spec::kNumThreads;
            vectors[i] =
                vector < Spec::kInputVectors
                    ? device::ld_weak_streaming(reinterpret_cast<const Vec128*>(row) + vector)
                    : Vec128{};
        }
    }

    DEEPCOMM_DEVICE void stage(int32_t first, Shared& shared) const {
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kCount; ++i) {
            const int32_t vector = first + i * Spec::kNumThreads;
            if constexpr (Spec::kCasts) {
                cast_vector(vectors[i], vector, shared);
            } else if (vector < Spec::kInputVectors) {
                reinterpret_cast<Vec128*>(shared.row)[vector] = vectors[i];
            }
        }
    }
};

/// Zeros behind the row, and scales that come with it.
template <typename Shared>
DEEPCOMM_DEVICE void stage_tail(const LowLatencyDispatchParams& params, const device::Block& block,
                                int32_t token, Shared& shared) {
    using Spec = typename Shared::Spec;
    constexpr int32_t kGiven = Spec::kCasts ? 0 : Spec::kScaleWords;
    const uint32_t* scales = params.scales + token * params.scale_stride;
    const int32_t first_zero = Spec::kRowWords + Spec::kScaleWords;
    DEEPCOMM_NO_UNROLL
    for (int32_t word = Spec::kRowWords + block.thread_idx(); word < Spec::kStagedWords;
         word += block.size()) {
        if (word < Spec::kRowWords + kGiven) shared.row[word] = scales[word - Spec::kRowWords];
        if (word >= first_zero) shared.row[word] = 0;
    }
    // The absent tiles of the last word of exponents.
    if (Spec::kCasts && Spec::kScaleFormat == ScaleFormat::kUe8m0 && block.is_leader()) {
        auto* bytes = reinterpret_cast<uint8_t*>(shared.row + Spec::kRowWords);
        DEEPCOMM_NO_UNROLL
        for (int32_t tile = Spec::kTiles; tile < 4 * Spec::kScaleWords; ++tile) bytes[tile] = 0;
    }
}

/// What the threads of a block load of a token, ahead of its turn.
template <typename Shared>
struct TokenInput {
    static constexpr int32_t kEarlier =
        4;  ///< ids in flight at once: all of them at T = 128, K = 8

    int32_t token;
    RowInput<Shared> row;
    IdBatch<1> own;             ///< of a lane's column
    IdBatch<kEarlier> earlier;  ///< of tokens before this one
    float weight;               ///< of a lane's column; in the last warp

    DEEPCOMM_DEVICE void load(const LowLatencyDispatchParams& params, const device::Block& block,
                              int32_t token_idx) {
        const int32_t num_topk = params.base.num_topk, lane = device::Warp{}.thread_idx();
        const int32_t first = token_idx * num_topk;
        token = token_idx;
        row.load(params.x + token * params.x_stride, block.thread_idx());
        own.load(params, {first + lane, 0, first + num_topk});
        earlier.load(params, earlier_ids(params, block, 0));
        weight = 0;
        if (params.topk_weights != nullptr && is_in_last_warp(block) && lane < num_topk) {
            weight = params.topk_weights[first + lane];
        }
    }

    /// The ids before the token that a thread compares, from a round on.
    DEEPCOMM_DEVICE IdRange earlier_ids(const LowLatencyDispatchParams& params,
                                        const device::Block& block, int32_t round) const {
        return {block.thread_idx() + round * block.size(), block.size(),
                token * params.base.num_topk};
    }
};

/// The last warp: writes the handle's copies.
template <typename Shared>
DEEPCOMM_DEVICE void write_handle(const LowLatencyDispatchParams& params, const device::Warp& warp,
                                  const TokenInput<Shared>& input) {
    const int32_t k = warp.thread_idx();
    if (k >= params.base.num_topk) return;
    const int64_t index = static_cast<int64_t>(input.token) * params.base.num_topk + k;
    params.handle_topk_idx[index] = expert_of(params, input.own.ids[0]);
    if (params.topk_weights != nullptr) params.handle_topk_weights[index] = input.weight;
}

/// The last warp: destinations of the token, in the order of their first columns.
template <typename Shared>
DEEPCOMM_DEVICE void find_destinations(const LowLatencyDispatchParams& params,
                                       const device::Warp& warp, const TokenInput<Shared>& input,
                                       Shared& shared) {
    const int32_t k = warp.thread_idx();
    const int32_t expert = expert_of(params, input.own.ids[0]);
    const int32_t num_local = params.base.map.num_local_experts;
    const int32_t dst = expert < 0 ? -1 : expert / num_local;
    const bool is_sent = dst >= 0 && !shared.peers.masked[dst];
    const uint32_t alike = device::warp_match(is_sent ? static_cast<uint32_t>(dst) : kNoExpert);
    const int32_t first = device::lowest_bit(alike);
    const uint32_t firsts = device::warp_ballot(is_sent && first == k);
    const int32_t dst_idx = device::popcount(firsts & ((1u << first) - 1u));
    if (is_sent && first == k) shared.destinations[dst_idx] = dst;
    if (k < params.base.num_topk) {
        shared.entries[k] = {is_sent ? dst_idx : -1, is_sent ? expert - dst * num_local : 0,
                             input.weight};
    }
    if (warp.is_leader()) shared.num_destinations = device::popcount(firsts);
}

/// How many tokens of this rank before this one have each of its experts. Each of the ids before is
/// read once and compared with all of the token's.
template <typename Shared>
DEEPCOMM_DEVICE void count_positions(const LowLatencyDispatchParams& params,
                                     const device::Block& block, TokenInput<Shared>& input,
                                     uint32_t* positions) {
    constexpr int32_t kCount = TokenInput<Shared>::kEarlier;
    const int32_t num_topk = params.base.num_topk, num_ids = input.token * num_topk;
    const int32_t mine = expert_of(params, input.own.ids[0]);
    DEEPCOMM_NO_UNROLL
    for (int32_t round = 0; round * block.size() < num_ids; round += kCount) {
        if (round > 0) input.earlier.load(params, input.earlier_ids(params, block, round));
        int32_t experts[kCount];
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kCount; ++i) experts[i] = expert_of(params, input.earlier.ids[i]);
        DEEPCOMM_NO_UNROLL
        for (int32_t k = 0; k < num_topk; ++k) {
            const int32_t expert = device::warp_shuffle(mine, k);
            uint32_t count = 0;
            DEEPCOMM_UNROLL
            for (int32_t i = 0; i < kCount; ++i) count += experts[i] == expert ? 1 : 0;
            if (count > 0 && expert >= 0) device::red_add_relaxed_block(&positions[k], count);
        }
    }
}

/// Stores the staged row and what its destinations need to place it.
template <typename Shared>
DEEPCOMM_DEVICE void store_packets(const LowLatencyDispatchParams& params,
                                   const device::Block& block, const LowLatencyTurn& turn,
                                   int32_t token, const uint32_t* positions, const Shared& shared) {
    using Spec = typename Shared::Spec;
    const int32_t num_topk = params.base.num_topk;
    const int64_t offset = params.base.map.row_offset(turn.slot, params.base.comm.rank, token);
    const int32_t num_destinations = shared.num_destinations;
    DEEPCOMM_NO_UNROLL
    for (int32_t i = block.thread_idx(); i < num_destinations * num_topk; i += block.size()) {
        const int32_t dst_idx = i / num_topk, k = i % num_topk;
        const LowLatencyEntry& entry = shared.entries[k];
        const bool is_there = entry.dst_idx == dst_idx;
        const uint32_t expert = is_there ? static_cast<uint32_t>(entry.local_expert) : kNoExpert;
        unsigned char* base = shared.peers.bases[shared.destinations[dst_idx]];
        device::st_relaxed_sys(
            packets_at(base, offset) + k,
            {{expert, positions[k], device::float_bits(entry.weight), turn.tag}});
    }
    DEEPCOMM_NO_UNROLL
    for (int32_t i = block.thread_idx(); i < Spec::kPackets; i += block.size()) {
        const uint32_t* words = shared.row + i * layout::kPacketWords;
        const Vec128 packet = {{words[0], words[1], words[2], turn.tag}};
        DEEPCOMM_NO_UNROLL
        for (int32_t dst_idx = 0; dst_idx < num_destinations; ++dst_idx) {
            unsigned char* base = shared.peers.bases[shared.destinations[dst_idx]];
            device::st_relaxed_sys(packets_at(base, offset) + params.base.map.num_topk + i, packet);
        }
    }
}

/// Stages the row; the vectors that have been loaded first.
template <typename Shared>
DEEPCOMM_DEVICE void stage_row(const LowLatencyDispatchParams& params, const device::Block& block,
                               TokenInput<Shared>& input, Shared& shared) {
    using Input = RowInput<Shared>;
    const unsigned char* row = params.x + input.token * params.x_stride;
    input.row.stage(block.thread_idx(), shared);
    DEEPCOMM_NO_UNROLL
    for (int32_t first = Input::kCount; first < Input::kAll; first += Input::kCount) {
        input.row.load(row, block.thread_idx() + first * block.size());
        input.row.stage(block.thread_idx() + first * block.size(), shared);
    }
    stage_tail(params, block, input.token, shared);
}

/// One token, whose input is on its way; then that of the block's next one is. has_peers: they are open,
/// as far as this thread knows. False: leave.
template <typename Shared>
DEEPCOMM_DEVICE bool send_token(const LowLatencyDispatchParams& params, const device::Block& block,
                                const LowLatencyTurn& turn, TokenInput<Shared>& input,
                                Shared& shared, bool has_peers) {
    const device::Warp warp;
    const int32_t token = input.token;
    uint32_t* positions = shared.positions[token / block.num_blocks() & 1];
    if (block.thread_idx() < params.base.num_topk) positions[block.thread_idx()] = 0;
    // ORDER: the token before has left shared memory; the zeros before the counts, peers before use
    block.sync();
    if (is_in_last_warp(block)) {
        find_destinations(params, warp, input, shared);
        write_handle(params, warp, input);
    }
    count_positions(params, block, input, positions);
    stage_row(params, block, input, shared);
    const int32_t following = token + block.num_blocks();
    if (following < params.base.num_tokens) input.load(params, block, following);
    if (!block.sync_and(has_peers)) return false;  // ORDER: the credits and the staged row, to all
    store_packets(params, block, turn, token, positions, shared);
    return true;
}

/// What the combine must know of the send phase.
template <typename Shared>
DEEPCOMM_DEVICE void record_send(const LowLatencyParams& params, const device::Block& block,
                                 const LowLatencyTurn& turn, const Shared& shared) {
    int32_t* connected = params.record + params.record_map.connected;
    DEEPCOMM_NO_UNROLL
    for (int32_t peer = block.thread_idx(); peer < params.map.num_ranks; peer += block.size()) {
        connected[peer] = shared.peers.masked[peer] ? 0 : 1;
    }
    if (block.is_leader()) params.record[params.record_map.tag] = static_cast<int32_t>(turn.tag);
}

/// Takes the turn and sends. The last block sends the headers, before its tokens. False: leave.
template <typename Shared>
DEEPCOMM_DEVICE bool send_dispatch(const LowLatencyDispatchParams& params,
                                   const device::Block& block, LowLatencyTurn* turn,
                                   Shared& shared) {
    const bool sends_headers = block.block_idx() == block.num_blocks() - 1;
    const int32_t num_tokens = params.base.num_tokens, first = block.block_idx();
    if (sends_headers) {
        if (!send_headers(params, block, turn, shared)) return false;
        record_send(params.base, block, *turn, shared);
    }
    TokenInput<Shared> input;
    if (first < num_tokens) input.load(params, block, first);
    bool has_peers = true;
    if (!sends_headers) {
        EarlyPeer early;
        *turn = take_turn(params.base, block, &early);
        has_peers = open_peers(params.base, Operation::kLowLatencyDispatch, block, *turn, early,
                               &shared.peers);
    }
    DEEPCOMM_NO_UNROLL
    for (int32_t token = first; token < num_tokens; token += block.num_blocks()) {
        if (!send_token(params, block, *turn, input, shared, has_peers)) return false;
    }
    return first < num_tokens || block.sync_and(has_peers);  // as one
}

}  // namespace deepcomm::kernels::low_latency
