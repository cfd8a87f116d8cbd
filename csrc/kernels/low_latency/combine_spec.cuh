// SPDX-License-Identifier: Apache-2.0
// What a combine kernel is compiled for, what it keeps in shared memory, and the headers of its
// operation: one packet a pair of ranks.
#pragma once

#include "kernels/low_latency/forward.cuh"

namespace deepcomm::kernels {

template <int kHidden, bool kHasNodes, int kThreads>
struct LowLatencyCombineSpec {
    using Format = typename low_latency::PayloadFormat<kHasNodes>::Type;
    static constexpr bool kIsOfNodes = kHasNodes;
    static constexpr int kNumThreads = kThreads;
    static constexpr int kNumSummers = kThreads - device::kWarpSize;  ///< of a block's first part
    static constexpr int kVectorWords = static_cast<int>(layout::kVectorWords);
    static constexpr int kRowWords = kHidden / 2;
    /// Whether a packet is a vector of its part: the thread that sums it sends it, and receives it alone.
    static constexpr bool kSendsVectors = Format::kWords == kVectorWords;
    static constexpr int kNumParts = static_cast<int>(layout::row_parts(kHidden));
    static constexpr int kPartVectors = static_cast<int>(layout::part_vectors(kHidden));
    static constexpr int kPartWords = kPartVectors * kVectorWords;
    static constexpr int kPartPackets =
        static_cast<int>(layout::part_packets(kHidden, Format::kWords));
    static constexpr int kStagedWords =
        static_cast<int>(round_up(kPartPackets * Format::kWords, kVectorWords));
    static constexpr int kPacketsOfThread = (kPartPackets + kThreads - 1) / kThreads;
    /// That it adds up at once: in blocks of 256 all.
    static constexpr int kSumPackets = kPacketsOfThread < 3 ? kPacketsOfThread : 3;
    static constexpr int kParkedFloats = kSumPackets * Format::kWords * 2 * kThreads;

    /// Vectors of a part that are of the row: the last part may have fewer.
    static DEEPCOMM_DEVICE int32_t num_vectors(int32_t part) {
        constexpr int32_t kLastVectors = kRowWords / kVectorWords - (kNumParts - 1) * kPartVectors;
        return part + 1 < kNumParts ? kPartVectors : kLastVectors;
    }

    static_assert(kHidden % 8 == 0, "rows move in 16-byte vectors");
    static_assert(kHidden <= layout::kMaxLowLatencyHidden, "as the host checks");
    static_assert(kThreads % 32 == 0, "whole warps");
};

/// What a combine over several nodes keeps beside the rest: nothing on one node.
template <bool kHasNodes, int kNumFloats>
struct LowLatencyNodesShared {};

template <int kNumFloats>
struct LowLatencyNodesShared<true, kNumFloats> {
    uint32_t cut_sources[layout::kMaxLowLatencyRanks];  ///< 1: nothing comes from there
    float parked[kNumFloats];                           ///< the sum of this node, set aside
};

template <int kHidden, int kPhases, int kThreads>
struct LowLatencyCombineConfig {
    static constexpr bool kHasNodes = (kPhases & kOverNodes) != 0;
    using Spec = LowLatencyCombineSpec<kHidden, kHasNodes, kThreads>;
    static constexpr bool kIsCarried = (kPhases & kCarried) != 0;
    static constexpr bool kReceives = (kPhases & kReceivePhase) != 0;
    using OfNodes = LowLatencyNodesShared<kHasNodes, kReceives ? Spec::kParkedFloats : 1>;
};

template <int kHidden, int kPhases, int kThreads>
struct LowLatencyCombineShared : LowLatencyCombineConfig<kHidden, kPhases, kThreads>::OfNodes {
    using Config = LowLatencyCombineConfig<kHidden, kPhases, kThreads>;
    using Spec = typename Config::Spec;
    static constexpr bool kHasNodes = Config::kHasNodes;
    static constexpr bool kIsCarried = Config::kIsCarried;
    /// Whether the sum of this rank's own rows stays staged for what a block receives first.
    static constexpr bool kKeepsSum = (kPhases & kKeepSums) != 0;

    alignas(16) uint32_t row[Spec::kStagedWords];  ///< a part of a sum that is sent
    low_latency::Peers peers;
    low_latency::Refusals refusals;
    int32_t num_tokens[layout::kMaxLowLatencyRanks];  ///< of each source, of the record
    int32_t connected[layout::kMaxLowLatencyRanks];   ///< of the record
    int32_t experts[device::kWarpSize];  ///< of the first token that the block receives a part of
    int32_t kept_entries[device::kWarpSize];  ///< likewise, of this rank's own rows
    float kept_weights[device::kWarpSize];
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

/// Reads what the dispatch has left of the ranks, and of the first token that the block receives a part
/// of. The block meets before it is used.
template <typename Shared>
DEEPCOMM_DEVICE void read_record(const LowLatencyCombineParams& params, const device::Block& block,
                                 Shared& shared) {
    const LowLatencyParams& base = params.base;
    const device::Warp warp;
    const int32_t first_token = block.block_idx() / Shared::Spec::kNumParts;
    const int32_t expert = load_expert(params, warp, first_token);
    DEEPCOMM_NO_UNROLL
    for (int32_t rank = block.thread_idx(); rank < base.map.num_ranks; rank += block.size()) {
        const int32_t num_tokens = base.record[base.record_map.num_tokens + rank];
        const int32_t connected = base.record[base.record_map.connected + rank];
        shared.num_tokens[rank] = num_tokens;
        shared.connected[rank] = connected;
    }
    if (warp.warp_idx() == 0) shared.experts[warp.thread_idx()] = expert;
}

/// Sources of which nothing comes: over several nodes not only those that are masked.
template <typename Shared>
DEEPCOMM_DEVICE uint32_t* cut_sources(Shared& shared) {
    if constexpr (Shared::kHasNodes) {
        return shared.cut_sources;
    } else {
        return shared.peers.masked;
    }
}

/// Finds them; the block meets before and after.
template <typename Shared>
DEEPCOMM_DEVICE void find_cut_sources(const LowLatencyParams& params, const device::Block& block,
                                      Shared& shared) {
    if constexpr (Shared::kHasNodes) {
        for (int32_t source = block.thread_idx(); source < params.map.num_ranks;
             source += block.size()) {
            const int32_t last = last_rank_from<true>(params, source);
            const uint32_t masked = shared.peers.masked[source] | shared.peers.masked[last];
            shared.cut_sources[source] = masked;
        }
        block.sync();  // ORDER: who is masked, to all
    }
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
        if (Shared::kHasNodes && shared.peers.bases[peer] == nullptr) continue;
        device::st_relaxed_sys(packets_at(shared.peers.bases[peer], offset),
                               {{params.signature, 0, handle, turn.tag}});
    }
}

/// Waits for the first packet of a source's header. Over several nodes it may say that there is none.
template <bool kHasNodes>
DEEPCOMM_DEVICE Arrival wait_source(const LowLatencyParams& params, const device::WaitSite& site,
                                    const Vec128* address, uint32_t tag, Vec128* packet) {
    if (!kHasNodes) return wait_packet(params, site, address, tag, packet);
    if (!params.mask_late) {
        return must_take_part(params, site, address, tag, packet) ? Arrival::kHere
                                                                  : Arrival::kFailed;
    }
    const Arrival arrival = wait_packet(params, site, address, tag, packet);
    if (arrival != Arrival::kHere || !tells_absence(*packet)) return arrival;
    return Arrival::kAbsent;
}

/// Masks a late source, or the rank that would have told of it; packet: the last that was seen.
template <typename Shared>
DEEPCOMM_DEVICE void note_absence(const LowLatencyParams& params, int32_t source,
                                  const Vec128& packet, const LowLatencyTurn& turn,
                                  Shared& shared) {
    const bool is_told = Shared::kHasNodes && packet.words[3] == turn.tag;
    const int32_t last = last_rank_from<Shared::kHasNodes>(params, source);
    const int32_t late = is_told ? source : last;
    mask_late_peer<Shared::kHasNodes>(params, turn, late);
    cut_sources(shared)[source] = 1;
    if (late == source) shared.peers.masked[source] = 1;
}

/// What the headers of a combine are compared with.
struct CombineHeaders {
    const LowLatencyTurn& turn;
    uint32_t handle;
    uint64_t start_ns;  ///< as for add_wait

    DEEPCOMM_DEVICE CombineHeaders(const LowLatencyParams& params, const LowLatencyTurn& of,
                                   uint64_t since_ns)
        : turn(of),
          handle(static_cast<uint32_t>(params.record[params.record_map.tag])),
          start_ns(since_ns) {}
};

/// The header of the peer that a thread looks at first, before anybody needs it; it may not be here.
DEEPCOMM_DEVICE Vec128 load_combine_header(const LowLatencyParams& params,
                                           const device::Block& block, const LowLatencyTurn& turn) {
    const int32_t peer = block.thread_idx();
    if (peer >= params.map.num_ranks) return {};
    return device::ld_relaxed_sys(
        packets_at(params.local, params.map.header_offset(turn.slot, peer)));
}

/// Waits for the header of one rank, unless it is masked, and notes whether it ends the operation;
/// packet: what was there before. False: leave.
template <typename Shared>
DEEPCOMM_DEVICE bool receive_combine_header(const LowLatencyParams& params,
                                            const CombineHeaders& headers, int32_t peer,
                                            Vec128 packet, Shared& shared) {
    const LowLatencyTurn& turn = headers.turn;
    shared.refusals.kinds[peer] = layout::RefusalKind::kNone;
    if (cut_sources(shared)[peer]) return true;
    const int32_t last = last_rank_from<Shared::kHasNodes>(params, peer);
    const device::WaitSite site = {Operation::kLowLatencyCombine, device::Role::kCount, last,
                                   turn.slot};
    const int64_t offset = params.map.header_offset(turn.slot, peer);
    Arrival arrival = Arrival::kHere;
    if (Shared::kHasNodes || packet.words[3] != turn.tag) {
        arrival = wait_source<Shared::kHasNodes>(params, site, packets_at(params.local, offset),
                                                 turn.tag, &packet);
    }
    add_wait(params, peer, headers.start_ns);
    if (arrival == Arrival::kAbsent) note_absence(params, peer, packet, turn, shared);
    if (arrival != Arrival::kHere) return arrival != Arrival::kFailed;
    note_header(params, &shared.refusals, peer, packet);
    if (shared.refusals.kinds[peer] == layout::RefusalKind::kNone &&
        packet.words[2] != headers.handle) {
        shared.refusals.kinds[peer] = layout::RefusalKind::kDiffers;
    }
    return true;
}

/// The same of all ranks; early: the header of the thread's first. False: leave.
template <typename Shared>
DEEPCOMM_DEVICE bool receive_combine_headers(const LowLatencyParams& params,
                                             const device::Block& block,
                                             const CombineHeaders& headers, Vec128 early,
                                             Shared& shared) {
    bool goes_on = true;
    DEEPCOMM_NO_UNROLL
    for (int32_t peer = block.thread_idx(); peer < params.map.num_ranks; peer += block.size()) {
        goes_on = receive_combine_header(params, headers, peer, early, shared) && goes_on;
        early = {};  // of no turn
    }
    return block.sync_and(goes_on);  // ORDER: the headers before the block acts on them
}

}  // namespace low_latency

}  // namespace deepcomm::kernels
