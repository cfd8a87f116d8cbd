// SPDX-License-Identifier: Apache-2.0
// The header of a dispatch: one block tells every rank how many tokens come for each of its experts
// and which tokens they are; every block of a receiver reads the headers of all sources.
#pragma once

#include "kernels/low_latency/dispatch_spec.cuh"

namespace deepcomm::kernels::low_latency {

// ---- sending

/// Looks at the ids of one token; the first thread that finds a wrong one says which.
DEEPCOMM_DEVICE layout::RefusalKind check_id(const LowLatencyDispatchParams& params, int32_t token,
                                             int32_t k) {
    const int64_t first = static_cast<int64_t>(token) * params.base.num_topk;
    const int64_t id = id_at(params, first + k);
    if (id < -1 || id >= params.num_experts) return layout::RefusalKind::kIdRange;
    if (id == -1) return layout::RefusalKind::kNone;
    for (int32_t before = 0; before < k; ++before) {
        if (id_at(params, first + before) == id) return layout::RefusalKind::kIdTwice;
    }
    return layout::RefusalKind::kNone;
}

/// Fills this rank's status: its host raises InvalidArgument.
DEEPCOMM_DEVICE void report_id(const LowLatencyDispatchParams& params, layout::RefusalKind kind,
                               int32_t token, int32_t k) {
    if (!claim_status(params.base)) return;
    layout::LowLatencyStatus* status = params.base.status;
    status->kind = kind;
    status->operation = static_cast<int32_t>(Operation::kLowLatencyDispatch);
    status->culprit = params.base.comm.rank;
    status->token = token;
    status->topk = k;
    status->value = id_at(params, static_cast<int64_t>(token) * params.base.num_topk + k);
    release_status(params.base);
}

/// Counts this rank's tokens by expert and marks them by destination.
template <typename Shared>
DEEPCOMM_DEVICE void count_tokens(const LowLatencyDispatchParams& params,
                                  const device::Block& block, Shared& shared) {
    const layout::LowLatencyLayout& map = params.base.map;
    for (int32_t i = block.thread_idx(); i < params.num_experts; i += block.size()) {
        shared.counts[i] = 0;
    }
    for (int32_t i = block.thread_idx(); i < map.num_ranks * map.token_words; i += block.size()) {
        shared.token_bits[i] = 0;
    }
    if (block.is_leader()) shared.refusal = 0;
    block.sync();  // ORDER: the zeros before the counts
    const int32_t num_ids = params.base.num_tokens * params.base.num_topk;
    for (int32_t i = block.thread_idx(); i < num_ids; i += block.size()) {
        const int32_t token = i / params.base.num_topk;
        const layout::RefusalKind kind = check_id(params, token, i % params.base.num_topk);
        if (kind != layout::RefusalKind::kNone) {
            device::atom_or_relaxed_block(&shared.refusal, refusal_flag(kind));
            report_id(params, kind, token, i % params.base.num_topk);
            continue;
        }
        const int32_t expert = expert_at(params, i);
        if (expert < 0) continue;
        device::red_add_relaxed_block(&shared.counts[expert], 1u);
        const int32_t word = expert / map.num_local_experts * map.token_words + token / 32;
        device::atom_or_relaxed_block(&shared.token_bits[word], 1u << token % 32);
    }
    block.sync();  // ORDER: all counts before they are read
}

/// Word of the header for dst.
template <typename Shared>
DEEPCOMM_DEVICE uint32_t header_word(const LowLatencyDispatchParams& params, const Shared& shared,
                                     int32_t dst, int32_t word) {
    const layout::LowLatencyLayout& map = params.base.map;
    if (word == 0) return params.base.signature;
    if (word == 1) return static_cast<uint32_t>(params.base.num_tokens) | shared.refusal;
    const int32_t expert = word - static_cast<int32_t>(layout::kHeaderWords);
    if (expert < 0) return 0;
    if (expert < map.num_local_experts) return shared.counts[dst * map.num_local_experts + expert];
    const int32_t bits = expert - map.num_local_experts;
    return bits < map.token_words ? shared.token_bits[dst * map.token_words + bits] : 0;
}

/// Sends the headers; the peers are found and their credits are there.
template <typename Shared>
DEEPCOMM_DEVICE void send_headers(const LowLatencyDispatchParams& params,
                                  const device::Block& block, const LowLatencyTurn& turn,
                                  Shared& shared) {
    const layout::LowLatencyLayout& map = params.base.map;
    count_tokens(params, block, shared);
    for (int32_t i = block.thread_idx(); i < map.num_ranks * map.header_packets;
         i += block.size()) {
        const int32_t dst = i / map.header_packets, packet = i % map.header_packets;
        if (shared.peers.masked[dst]) continue;
        const int32_t word = packet * static_cast<int32_t>(layout::kPacketWords);
        const int64_t offset = map.header_offset(turn.slot, params.base.comm.rank);
        device::st_relaxed_sys(
            packets_at(shared.peers.bases[dst], offset) + packet,
            {{header_word(params, shared, dst, word), header_word(params, shared, dst, word + 1),
              header_word(params, shared, dst, word + 2), turn.tag}});
    }
}

// ---- receiving

/// Where late sources are masked, all blocks must agree on who takes part: the first to know says.
DEEPCOMM_DEVICE bool takes_part(const LowLatencyParams& params, const LowLatencyTurn& turn,
                                int32_t source, bool is_here) {
    uint64_t* decision = &params.decisions[turn.slot * params.map.num_ranks + source];
    const uint64_t mine = static_cast<uint64_t>(turn.tag) << 1 | (is_here ? 1u : 0u);
    const uint64_t before = device::ld_relaxed_gpu(decision);
    if (before >> 1 == turn.tag) return before & 1;
    const uint64_t found = device::atom_cas_relaxed_gpu(decision, before, mine);
    return found == before ? is_here : (found & 1) != 0;
}

/// Waits for the first packet of each source, where one must know how long that takes or where a
/// late source is masked: the blocks then agree about who takes part. False: leave.
template <typename Shared>
DEEPCOMM_DEVICE bool await_sources(const LowLatencyParams& params, const device::Block& block,
                                   const LowLatencyTurn& turn, uint64_t start_ns, Shared& shared) {
    bool goes_on = true;
    for (int32_t source = block.thread_idx(); source < params.map.num_ranks;
         source += block.size()) {
        const bool was_masked = shared.peers.masked[source] != 0;
        Arrival arrival = Arrival::kAbsent;
        if (!was_masked) {
            const device::WaitSite site = {Operation::kLowLatencyDispatch, device::Role::kCount,
                                           source, turn.slot};
            const int64_t offset = params.map.header_offset(turn.slot, source);
            Vec128 packet;
            arrival =
                wait_packet(params, site, packets_at(params.local, offset), turn.tag, &packet);
            add_wait(params, source, start_ns);
        }
        goes_on = goes_on && arrival != Arrival::kFailed;
        if (!params.mask_late) continue;
        const bool is_present = takes_part(params, turn, source, arrival == Arrival::kHere);
        if (!is_present && !was_masked) mask_late_peer(params, source);
        shared.peers.masked[source] = is_present ? 0 : 1;
    }
    return block.sync_and(goes_on);  // ORDER: the decisions before the block acts on them
}

/// Puts one word of a source's header where it belongs.
template <typename Shared>
DEEPCOMM_DEVICE void take_header_word(const LowLatencyDispatchParams& params, Shared& shared,
                                      int32_t source, int32_t word, uint32_t value) {
    const layout::LowLatencyLayout& map = params.base.map;
    const int32_t expert = word - static_cast<int32_t>(layout::kHeaderWords);
    if (word == 1) shared.num_tokens[source] = static_cast<int32_t>(value & kTokenMask);
    if (expert < 0) return;
    if (expert < map.num_local_experts) {
        shared.counts[source * map.num_local_experts + expert] = value;
    } else if (expert - map.num_local_experts < map.token_words) {
        shared.token_bits[source * map.token_words + expert - map.num_local_experts] = value;
    }
}

/// Reads the headers of all sources. False: leave.
template <typename Shared>
DEEPCOMM_DEVICE bool receive_headers(const LowLatencyDispatchParams& params,
                                     const device::Block& block, const LowLatencyTurn& turn,
                                     Shared& shared) {
    const LowLatencyParams& base = params.base;
    const uint64_t start_ns = start_of_waits(base, block);
    block.sync();  // ORDER: the peers are found, and what was sent from shared memory is read
    bool goes_on = true;
    if (start_ns != 0 || base.mask_late)
        goes_on = await_sources(base, block, turn, start_ns, shared);
    if (!goes_on) return false;
    const int32_t num_packets = base.map.header_packets;
    for (int32_t i = block.thread_idx(); i < base.map.num_ranks * num_packets; i += block.size()) {
        const int32_t source = i / num_packets, index = i % num_packets;
        Vec128 packet = {{index == 0 ? base.signature : 0, 0, 0, 0}};  // masked: nothing comes
        if (!shared.peers.masked[source]) {
            const device::WaitSite site = {Operation::kLowLatencyDispatch, device::Role::kCount,
                                           source, turn.slot};
            const int64_t offset = base.map.header_offset(turn.slot, source);
            goes_on = must_arrive(base, site, packets_at(base.local, offset) + index, turn.tag,
                                  &packet) &&
                      goes_on;
        }
        if (index == 0) note_header(base, &shared.refusals, source, packet);
        const int32_t word = index * static_cast<int32_t>(layout::kPacketWords);
        for (int32_t part = 0; part < layout::kPacketWords; ++part) {
            take_header_word(params, shared, source, word + part, packet.words[part]);
        }
    }
    return block.sync_and(goes_on);  // ORDER: all words before they are used
}

}  // namespace deepcomm::kernels::low_latency
