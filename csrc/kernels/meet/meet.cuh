// SPDX-License-Identifier: Apache-2.0
// The meeting that opens every high-throughput operation: headers go from all ranks to all, and
// every block of every rank comes to the same verdict. PROTOCOLS.md: meeting.
#pragma once

#include "device/device.cuh"
#include "kernels/meet/params.hpp"

namespace deepcomm::kernels {

template <int32_t kNumRanks>
struct MeetTable {
    Header headers[kNumRanks];
    MeetStatus status;
    int32_t culprit;
    int32_t most_tokens;
};

DEEPCOMM_DEVICE device::WaitContext wait_context(const CommParams& comm) {
    return {comm.record, comm.timeout_ns, comm.rank, comm.names};
}

DEEPCOMM_DEVICE device::Vec128* header_at(const MeetParams& params, uint32_t epoch, int32_t dst,
                                          int32_t src) {
    return reinterpret_cast<device::Vec128*>(params.comm.bases[dst] +
                                             params.layout.header(epoch, src));
}

/// By one thread, before it publishes: an earlier operation's trouble that the host has not raised yet
/// is a reason to refuse one that all hosts wait for. They then raise in the same call.
DEEPCOMM_DEVICE uint32_t earlier_refusal(const MeetParams& params) {
    uint64_t* has_trouble = params.has_trouble;
    if (!params.host_waits || device::ld_relaxed_gpu(has_trouble) == 0) return 0;
    const auto clear = static_cast<uint32_t>(layout::RecordState::kClear);
    if (device::ld_relaxed_sys(&params.trouble->state) != clear) return kUnraisedTrouble;
    device::st_relaxed_gpu(has_trouble, 0);
    return 0;
}

/// Whether the stage before has come to its end; what has failed there ends here as well.
DEEPCOMM_DEVICE bool may_begin(const MeetParams& params, uint32_t epoch) {
    return params.verdict_before == nullptr || params.verdict_before->done_epoch == epoch;
}

/// Whether the stage before has come to nothing, and has left nothing to go on with.
DEEPCOMM_DEVICE bool was_called_off(const MeetParams& params) {
    return params.verdict_before != nullptr && params.verdict_before->status != MeetStatus::kGood;
}

/// The part of a header that the device knows.
struct Entry {
    uint32_t refusal;  ///< added to the host's
    int32_t num_tokens;
};

/// What was found, or that the operation was called off one stage before.
DEEPCOMM_DEVICE Entry entry_after(const MeetParams& params, const Entry& found) {
    if (!was_called_off(params)) return found;
    const Verdict& before = *params.verdict_before;
    const uint32_t reasons = before.theirs.refusal & (kFailedBefore - 1);
    const uint32_t told = kFailedBefore | static_cast<uint32_t>(before.status) << kStatusShift |
                          static_cast<uint32_t>(before.culprit) << kCulpritShift;
    return {reasons | told, before.most_tokens};
}

/// By one group.
template <typename Group>
DEEPCOMM_DEVICE void publish_header(const MeetParams& params, const Group& group, uint32_t epoch,
                                    const Entry& found) {
    const Header& mine = params.header;
    const Entry entry = entry_after(params, found);
    const device::Vec128 first = {{mine.signature, static_cast<uint32_t>(mine.capacity),
                                   static_cast<uint32_t>(entry.num_tokens), epoch}};
    const device::Vec128 second = {
        {mine.landing, static_cast<uint32_t>(mine.alignment), mine.refusal | entry.refusal, epoch}};
    // ORDER: what earlier kernels of this rank have read is free to be written by whoever has seen
    // the header; pairs with the fence of await_headers
    device::fence_acq_rel_sys();
    for (int32_t peer = group.thread_idx(); peer < params.comm.num_ranks; peer += group.size()) {
        device::Vec128* packets = header_at(params, epoch, peer, params.comm.rank);
        device::st_relaxed_sys(packets, first);
        device::st_relaxed_sys(packets + 1, second);
    }
}

/// Waits for a packet whose last word is the epoch; it carries its data itself.
DEEPCOMM_DEVICE bool await_packet(const device::WaitContext& context, const device::WaitSite& site,
                                  const device::Vec128* address, uint32_t epoch,
                                  device::Vec128* packet) {
    return device::wait_until(context, site, epoch, address, [&]() -> device::Observed {
        *packet = device::ld_relaxed_sys(address);
        return {packet->words[3], packet->words[3] == epoch};
    });
}

DEEPCOMM_DEVICE Header header_of(const device::Vec128& first, const device::Vec128& second) {
    return {first.words[0],
            static_cast<int32_t>(first.words[1]),
            static_cast<int32_t>(first.words[2]),
            second.words[0],
            static_cast<int32_t>(second.words[1]),
            second.words[2]};
}

DEEPCOMM_DEVICE bool await_header(const MeetParams& params, const device::WaitSite& site,
                                  uint32_t epoch, Header* header) {
    const device::Vec128* packets = header_at(params, epoch, params.comm.rank, site.peer);
    const device::WaitContext context = wait_context(params.comm);
    device::Vec128 first{}, second{};
    if (!await_packet(context, site, packets, epoch, &first)) return false;
    if (!await_packet(context, site, packets + 1, epoch, &second)) return false;
    *header = header_of(first, second);
    return true;
}

/// By one thread: the verdict, alike on all ranks but for whom a rank sees as different.
template <int32_t kNumRanks>
DEEPCOMM_DEVICE void judge(const MeetParams& params, MeetTable<kNumRanks>* table) {
    table->status = MeetStatus::kGood;
    table->culprit = layout::kNoPeer;
    table->most_tokens = 0;
    const Header& mine = table->headers[params.comm.rank];
    for (int32_t rank = kNumRanks - 1; rank >= 0; --rank) {
        const Header& theirs = table->headers[rank];
        if (theirs.num_tokens > table->most_tokens) table->most_tokens = theirs.num_tokens;
        if (theirs.signature == mine.signature && theirs.alignment == mine.alignment) continue;
        table->status = MeetStatus::kMismatch;
        table->culprit = rank;
    }
    for (int32_t rank = kNumRanks - 1; rank >= 0; --rank) {
        const uint32_t refusal = table->headers[rank].refusal;
        if (refusal == 0) continue;
        const bool has_failed = (refusal & kFailedBefore) != 0;
        table->status = has_failed ? static_cast<MeetStatus>(refusal >> kStatusShift & 3)
                                   : MeetStatus::kRefused;
        table->culprit = rank;
        if (has_failed) table->most_tokens = table->headers[rank].num_tokens;
    }
    if (table->status == MeetStatus::kGood && table->most_tokens > params.max_tokens) {
        table->status = MeetStatus::kMustGrow;
    }
}

/// All threads of a block: fills the table. False when a rank did not come.
template <int32_t kNumRanks>
DEEPCOMM_DEVICE bool await_headers(const MeetParams& params, const device::Block& block,
                                   device::Operation operation, uint32_t epoch,
                                   MeetTable<kNumRanks>* table) {
    bool is_complete = true;
    for (int32_t peer = block.thread_idx(); peer < kNumRanks; peer += block.size()) {
        const device::WaitSite site = {operation, device::Role::kMeet, peer};
        const uint64_t begin_ns = device::globaltimer_ns();
        is_complete = await_header(params, site, epoch, &table->headers[peer]) && is_complete;
        if (block.block_idx() == 0) {
            auto* waits = reinterpret_cast<uint64_t*>(params.counters + 1);
            device::red_add_relaxed_gpu(waits + peer, device::globaltimer_ns() - begin_ns);
        }
        device::fence_acq_rel_sys();  // ORDER: pairs with the fence of publish_header
    }
    if (!block.sync_and(is_complete)) return false;  // ORDER: the table before its judge
    if (block.is_leader()) judge(params, table);
    block.sync();  // ORDER: the verdict before anybody reads it
    return true;
}

/// All threads of a block: fills the table again, in a kernel after the one that has met.
template <int32_t kNumRanks>
DEEPCOMM_DEVICE void recall_headers(const MeetParams& params, const device::Block& block,
                                    uint32_t epoch, MeetTable<kNumRanks>* table) {
    for (int32_t peer = block.thread_idx(); peer < kNumRanks; peer += block.size()) {
        const device::Vec128* packets = header_at(params, epoch, params.comm.rank, peer);
        const device::Vec128 first = device::ld_relaxed_sys(packets);
        const device::Vec128 second = device::ld_relaxed_sys(packets + 1);
        table->headers[peer] = header_of(first, second);
    }
    block.sync();  // ORDER: the table before its judge
    if (block.is_leader()) judge(params, table);
    block.sync();  // ORDER: the verdict before anybody reads it
}

/// The verdict as the kernels after this one take it. By one thread of one block.
template <int32_t kNumRanks>
DEEPCOMM_DEVICE void record_verdict(const MeetParams& params, const MeetTable<kNumRanks>& table,
                                    uint32_t epoch) {
    Verdict* verdict = params.verdict;
    verdict->met_epoch = epoch;
    verdict->status = table.status;
    verdict->most_tokens = table.most_tokens;
    verdict->culprit = layout::kNoPeer;
    verdict->mine = params.header;
    if (table.culprit == layout::kNoPeer) return;
    const Header& theirs = table.headers[table.culprit];
    verdict->theirs = theirs;
    verdict->culprit = params.comm.names.of(table.culprit);
    if ((theirs.refusal & kFailedBefore) == 0) return;
    verdict->culprit = static_cast<int32_t>(theirs.refusal) >> kCulpritShift;
    // Who was there knows more than the peer that tells.
    const Verdict& before = *params.verdict_before;
    if (before.status == MeetStatus::kGood || before.culprit != verdict->culprit) return;
    verdict->mine = before.mine;
    verdict->theirs = before.theirs;
}

/// Lets the host know of an operation that does not take place, unless it is itself the reason. By the
/// thread that has recorded the verdict.
DEEPCOMM_DEVICE void report_trouble(const MeetParams& params) {
    Trouble* trouble = params.trouble;
    const Verdict& verdict = *params.verdict;
    if (!params.reports || verdict.status == MeetStatus::kGood) return;
    if (params.header.refusal != 0) return;
    const auto clear = static_cast<uint32_t>(layout::RecordState::kClear);
    const auto writing = static_cast<uint32_t>(layout::RecordState::kWriting);
    if (device::atom_cas_relaxed_sys(&trouble->state, clear, writing) != clear) return;
    device::st_relaxed_gpu(params.has_trouble, 1);
    trouble->status = verdict.status;
    trouble->culprit = verdict.culprit;
    trouble->max_tokens = verdict.most_tokens;
    trouble->mine = verdict.mine;
    trouble->theirs = verdict.theirs;
    // ORDER: the fields above; pairs with the host's acquire of kComplete
    device::st_release_sys(&trouble->state, static_cast<uint32_t>(layout::RecordState::kComplete));
}

}  // namespace deepcomm::kernels
