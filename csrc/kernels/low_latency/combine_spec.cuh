// SPDX-License-Identifier: Apache-2.0
// What a combine kernel is compiled for, what it keeps in shared memory, and the headers of its
// operation: one packet a pair of ranks.
#pragma once

#include "kernels/low_latency/refusal.cuh"

namespace deepcomm::kernels {

template <int kHidden, int kThreads>
struct LowLatencyCombineSpec {
    static constexpr int kNumThreads = kThreads;
    static constexpr int kRowVectors = kHidden / 8;
    static constexpr int kRowWords = kHidden / 2;
    static constexpr int kPackets = static_cast<int>(layout::packets_of(kRowWords));
    static constexpr int kStagedWords =
        static_cast<int>(round_up(kPackets * layout::kPacketWords, 4));

    static_assert(kHidden % 8 == 0, "rows move in 16-byte vectors");
    static_assert(kHidden <= layout::kMaxLowLatencyHidden, "a row is staged in shared memory");
    static_assert(kThreads % 32 == 0, "whole warps");
};

template <int kHidden, int kPhases, int kThreads>
struct LowLatencyCombineShared {
    using Spec = LowLatencyCombineSpec<kHidden, kThreads>;

    alignas(16) uint32_t row[Spec::kStagedWords];  ///< of the partial sum that is sent
    low_latency::Peers peers;
    low_latency::Refusals refusals;
    int32_t num_tokens[layout::kMaxLowLatencyRanks];  ///< of each source, of the record
    int32_t connected[layout::kMaxLowLatencyRanks];   ///< of the record
    int32_t experts[device::kWarpSize];  ///< of the first token that the block receives
};

namespace low_latency {

/// Whether the dispatch was refused. All ranks know: none of its combines takes a turn.
DEEPCOMM_DEVICE bool is_void(const LowLatencyParams& params) {
    return params.record[params.record_map.is_void] != 0;
}

/// The expert in a lane's column of a token of this rank; -1: none, as for a token that is none.
DEEPCOMM_DEVICE int32_t load_expert(const LowLatencyCombineParams& params, const device::Warp& warp,
                                    int32_t token) {
    const int32_t k = warp.thread_idx();
    if (k >= params.base.num_topk || token >= params.base.num_tokens) return -1;
    return params.topk_idx[static_cast<int64_t>(token) * params.base.num_topk + k];
}

/// Reads what the dispatch has left of the ranks, and of the first token that the block receives.
/// The block meets before it is used.
template <typename Shared>
DEEPCOMM_DEVICE void read_record(const LowLatencyCombineParams& params, const device::Block& block,
                                 Shared& shared) {
    const LowLatencyParams& base = params.base;
    const device::Warp warp;
    const int32_t expert = load_expert(params, warp, block.block_idx());
    DEEPCOMM_NO_UNROLL
    for (int32_t rank = block.thread_idx(); rank < base.map.num_ranks; rank += block.size()) {
        const int32_t num_tokens = base.record[base.record_map.num_tokens + rank];
        const int32_t connected = base.record[base.record_map.connected + rank];
        shared.num_tokens[rank] = num_tokens;
        shared.connected[rank] = connected;
    }
    if (warp.warp_idx() == 0) shared.experts[warp.thread_idx()] = expert;
}

/// Tells every peer that this rank takes part, with what, and of which dispatch.
template <typename Shared>
DEEPCOMM_DEVICE void send_combine_headers(const LowLatencyParams& params,
                                          const device::Block& block, const LowLatencyTurn& turn,
                                          const Shared& shared) {
    const auto handle = static_cast<uint32_t>(params.record[params.record_map.tag]);
    const int64_t offset = params.map.header_offset(turn.slot, params.comm.rank);
    DEEPCOMM_NO_UNROLL
    for (int32_t peer = block.thread_idx(); peer < params.map.num_ranks; peer += block.size()) {
        if (shared.peers.masked[peer]) continue;
        device::st_relaxed_sys(packets_at(shared.peers.bases[peer], offset),
                               {{params.signature, 0, handle, turn.tag}});
    }
}

/// Waits for the header of each rank that is not masked, and notes who ends the operation; start_ns
/// as for add_wait. False: leave.
template <typename Shared>
DEEPCOMM_DEVICE bool receive_combine_headers(const LowLatencyParams& params,
                                             const device::Block& block, const LowLatencyTurn& turn,
                                             uint64_t start_ns, Shared& shared) {
    const auto handle = static_cast<uint32_t>(params.record[params.record_map.tag]);
    bool goes_on = true;
    DEEPCOMM_NO_UNROLL
    for (int32_t peer = block.thread_idx(); peer < params.map.num_ranks; peer += block.size()) {
        shared.refusals.kinds[peer] = layout::RefusalKind::kNone;
        if (shared.peers.masked[peer]) continue;
        const device::WaitSite site = {Operation::kLowLatencyCombine, device::Role::kCount, peer,
                                       turn.slot};
        const int64_t offset = params.map.header_offset(turn.slot, peer);
        Vec128 packet;
        const Arrival arrival =
            wait_packet(params, site, packets_at(params.local, offset), turn.tag, &packet);
        add_wait(params, peer, start_ns);
        goes_on = goes_on && arrival != Arrival::kFailed;
        if (arrival == Arrival::kAbsent) {
            mask_late_peer(params, peer);
            shared.peers.masked[peer] = 1;
        }
        if (arrival != Arrival::kHere) continue;
        note_header(params, &shared.refusals, peer, packet);
        if (shared.refusals.kinds[peer] == layout::RefusalKind::kNone &&
            packet.words[2] != handle) {
            shared.refusals.kinds[peer] = layout::RefusalKind::kDiffers;
        }
    }
    return block.sync_and(goes_on);  // ORDER: the headers before the block acts on them
}

}  // namespace low_latency

}  // namespace deepcomm::kernels
