// SPDX-License-Identifier: Apache-2.0
// Operations that a rank refuses, or about which ranks differ: what headers say of it, and what the
// host is told.
#pragma once

#include "kernels/low_latency/packets.cuh"

namespace deepcomm::kernels::low_latency {

// Word 1 of a header: the number of tokens, and why nothing comes.
constexpr uint32_t kTokenMask = 0x00FFFFFFu;
constexpr int32_t kRefusalShift = 24;

DEEPCOMM_DEVICE uint32_t refusal_flag(layout::RefusalKind kind) {
    return static_cast<uint32_t>(kind) << kRefusalShift;
}

/// Whether a header says, over several nodes, that its rank takes no part.
DEEPCOMM_DEVICE bool tells_absence(const Vec128& packet) {
    return packet.words[1] >> kRefusalShift == static_cast<uint32_t>(layout::RefusalKind::kAbsent);
}

/// Waits for the header of a rank that must take part: where it is said not to, the deadline passes.
DEEPCOMM_DEVICE bool must_take_part(const LowLatencyParams& params, const device::WaitSite& site,
                                    const Vec128* address, uint32_t tag, Vec128* packet) {
    const device::WaitContext context = wait_context(params, site.role);
    return device::wait_until(context, site, tag, address, [&]() -> device::Observed {
        *packet = device::ld_relaxed_sys(address);
        return {packet->words[3], packet->words[3] == tag && !tells_absence(*packet)};
    });
}

/// What the headers of an operation said, by rank; in shared memory.
struct Refusals {
    layout::RefusalKind kinds[layout::kMaxLowLatencyRanks];
    uint32_t signatures[layout::kMaxLowLatencyRanks];
};

/// Notes whether the first packet of a peer's header ends the operation.
DEEPCOMM_DEVICE void note_header(const LowLatencyParams& params, Refusals* refusals, int32_t peer,
                                 const Vec128& packet) {
    const auto kind = static_cast<layout::RefusalKind>(packet.words[1] >> kRefusalShift);
    const bool differs = kind == layout::RefusalKind::kNone && packet.words[0] != params.signature;
    refusals->kinds[peer] = differs ? layout::RefusalKind::kDiffers : kind;
    refusals->signatures[peer] = packet.words[0];
}

/// The first rank whose header ends the operation, or kNoPeer.
DEEPCOMM_DEVICE int32_t find_culprit(const LowLatencyParams& params, const Refusals& refusals) {
    for (int32_t peer = 0; peer < params.map.num_ranks; ++peer) {
        if (refusals.kinds[peer] != layout::RefusalKind::kNone) return peer;
    }
    return layout::kNoPeer;
}

/// Adds to the statistics what a peer took since start_ns; 0: nobody asks.
DEEPCOMM_DEVICE void add_wait(const LowLatencyParams& params, int32_t peer, uint64_t start_ns) {
    if (start_ns == 0) return;
    params.wait_us[peer] += static_cast<int64_t>((device::globaltimer_ns() - start_ns) / 1000);
}

/// Begin of the waits, in the one block that keeps the statistics if somebody asks; else 0.
DEEPCOMM_DEVICE uint64_t start_of_waits(const LowLatencyParams& params,
                                        const device::Block& block) {
    const bool is_asked = params.wait_us != nullptr && block.block_idx() == 0;
    return is_asked ? device::globaltimer_ns() : 0;
}

// ---- the host

/// Claims the status for one reason; the caller fills it and releases it. False: another is there.
DEEPCOMM_DEVICE bool claim_status(const LowLatencyParams& params) {
    const auto clear = static_cast<uint32_t>(layout::RecordState::kClear);
    const auto writing = static_cast<uint32_t>(layout::RecordState::kWriting);
    return device::atom_cas_relaxed_sys(&params.status->state, clear, writing) == clear;
}

DEEPCOMM_DEVICE void release_status(const LowLatencyParams& params) {
    // ORDER: the fields; pairs with the host's acquire of kComplete
    device::st_release_sys(&params.status->state,
                           static_cast<uint32_t>(layout::RecordState::kComplete));
}

/// The text of a rank that refused on its host, from the packets after the header's first.
DEEPCOMM_DEVICE void copy_message(const LowLatencyParams& params, const LowLatencyTurn& turn,
                                  int32_t culprit) {
    const Vec128* packets =
        packets_at(params.local, params.map.header_offset(turn.slot, culprit)) + 1;
    const device::WaitSite site = {Operation::kLowLatencyDispatch, device::Role::kCount, culprit,
                                   turn.slot};
    DEEPCOMM_NO_UNROLL
    for (int32_t i = 0; i < layout::packets_of(layout::kMessageWords); ++i) {
        Vec128 packet{};
        if (!must_arrive(params, site, packets + i, turn.tag, &packet)) return;
        uint32_t* words = params.status->message + i * layout::kPacketWords;
        DEEPCOMM_UNROLL
        for (int32_t part = 0; part < layout::kPacketWords; ++part) {
            words[part] = packet.words[part];
        }
    }
}

/// One thread tells the host why nothing was delivered, unless this rank is at fault and knows.
DEEPCOMM_DEVICE void report_refusal(const LowLatencyParams& params, Operation operation,
                                    const LowLatencyTurn& turn, int32_t culprit,
                                    const Refusals& refusals) {
    if (culprit == params.comm.rank || !claim_status(params)) return;
    layout::LowLatencyStatus* status = params.status;
    status->kind = refusals.kinds[culprit];
    status->operation = static_cast<int32_t>(operation);
    status->culprit = culprit;
    status->signature = params.signature;
    status->peer_signature = refusals.signatures[culprit];
    if (status->kind == layout::RefusalKind::kByHost) copy_message(params, turn, culprit);
    release_status(params);
}

}  // namespace deepcomm::kernels::low_latency
