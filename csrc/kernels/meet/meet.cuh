// SPDX-License-Identifier: Apache-2.0
// The meeting that opens every high-throughput operation: headers go from all ranks to all, and
// every block of every rank comes to the same verdict. PROTOCOLS.md: meeting.
#pragma once

#include "device/device.cuh"
#include "kernels/meet/params.hpp"
#include "layout/plan.hpp"

namespace deepcomm::kernels {

template <int32_t kNumRanks>
struct MeetTable {
    Header headers[kNumRanks];
    MeetStatus status;
    int32_t culprit;
    int32_t most_tokens;
};

DEEPCOMM_DEVICE device::WaitContext wait_context(const CommParams& comm) {
    return {comm.record, comm.timeout_ns, comm.rank, comm.names, comm.failed};
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

/// By one thread of a kernel that cannot begin, since what comes before it has not ended: the host
/// must hear of it, though in most cases a wait that ran out has told it already.
DEEPCOMM_DEVICE void report_no_begin(const MeetParams& params, device::Operation operation,
                                     uint32_t epoch, uint32_t ready_epoch) {
    const device::WaitSite site = {operation, device::Role::kMeet, params.comm.rank};
    device::record_failure(wait_context(params.comm), site, device::FailureKind::kCheck, epoch,
                           ready_epoch);
}

/// Whether the stage before has come to its end; what has failed there ends here as well.
DEEPCOMM_DEVICE bool may_begin(const MeetParams& params, const device::Block& block,
                               device::Operation operation, uint32_t epoch) {
    if (params.verdict_before == nullptr) return true;
    const uint32_t done_epoch = params.verdict_before->done_epoch;
    if (done_epoch == epoch) return true;
    if (block.block_idx() == 0 && block.is_leader()) {
        report_no_begin(params, operation, epoch, done_epoch);
    }
    return false;
}

/// What a rank with a handle has to say against the operation.
DEEPCOMM_DEVICE uint32_t refusal_of_plan(const int32_t* plan, const layout::PlanLayout& words) {
    return plan[words.made()] != 0 ? 0 : kUnmadeHandle;
}

/// Whether the stage before has come to nothing.
DEEPCOMM_DEVICE bool was_called_off(const MeetParams& params) {
    return params.verdict_before != nullptr && params.verdict_before->status != MeetStatus::kGood;
}

/// Whether a wait of this rank has failed, and with it all that is queued behind it. A stage before may
/// then seem to have ended, since epochs stand still.
DEEPCOMM_DEVICE bool has_failed(const CommParams& comm) {
    return device::ld_relaxed_gpu(comm.failed) != 0;
}

/// Whether the stage before has left something to go on with.
DEEPCOMM_DEVICE bool has_input(const MeetParams& params) {
    return !was_called_off(params) && !has_failed(params.comm);
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
    const uint32_t reasons = before.theirs.refusal & kReasons;
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
    // The epoch may be that of an operation that has failed; peers must take nothing for its header.
    const bool may_publish = !has_failed(params.comm);
    // ORDER: what earlier kernels of this rank have read is free to be written by whoever has seen
    // the header; pairs with the fence of await_headers
    device::fence_acq_rel_sys();
    if (!may_publish) return;
    DEEPCOMM_NO_UNROLL
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

/// What a rank's header says of the operation: that the rank refuses it, or what it came to before.
DEEPCOMM_DEVICE MeetStatus told_by(const Header& theirs) {
    if ((theirs.refusal & kReasons) != 0) return MeetStatus::kRefused;
    return static_cast<MeetStatus>(theirs.refusal >> kStatusShift & kStatusMask);
}

DEEPCOMM_DEVICE bool outweighs(MeetStatus status, MeetStatus other) {
    return status != MeetStatus::kGood && (other == MeetStatus::kGood || status < other);
}

/// By one thread: the verdict, alike on all ranks but for whom a rank sees as different. It is the
/// gravest of what ranks tell and of what shows here; of ranks alike the lowest is the culprit.
template <int32_t kNumRanks>
DEEPCOMM_DEVICE void judge(const MeetParams& params, MeetTable<kNumRanks>* table) {
    table->status = MeetStatus::kGood;
    table->culprit = layout::kNoPeer;
    int32_t most_told = 0, most_here = 0;  // tokens of a rank, in a stage before and in this one
    const Header& mine = table->headers[params.comm.rank];
    DEEPCOMM_NO_UNROLL
    for (int32_t rank = kNumRanks - 1; rank >= 0; --rank) {
        const Header& theirs = table->headers[rank];
        MeetStatus status = told_by(theirs);
        const int32_t told = status == MeetStatus::kMustGrow ? theirs.num_tokens : 0;
        const int32_t here = status == MeetStatus::kMustGrow ? 0 : theirs.num_tokens;
        most_told = told > most_told ? told : most_told;
        most_here = here > most_here ? here : most_here;
        const bool differs =
            theirs.signature != mine.signature || theirs.alignment != mine.alignment;
        if (differs && outweighs(MeetStatus::kMismatch, status)) status = MeetStatus::kMismatch;
        if (status == MeetStatus::kGood || outweighs(table->status, status)) continue;
        table->status = status;
        table->culprit = rank;
    }
    table->most_tokens = table->status == MeetStatus::kMustGrow ? most_told : most_here;
    if (table->status == MeetStatus::kGood && most_here > params.max_tokens) {
        table->status = MeetStatus::kMustGrow;
    }
}

/// All threads of a block: fills the table. False when a rank did not come.
template <int32_t kNumRanks>
DEEPCOMM_DEVICE bool await_headers(const MeetParams& params, const device::Block& block,
                                   device::Operation operation, uint32_t epoch,
                                   MeetTable<kNumRanks>* table) {
    bool is_complete = true;
    DEEPCOMM_NO_UNROLL
    for (int32_t peer = block.thread_idx(); peer < kNumRanks; peer += block.size()) {
        const device::WaitSite site = {operation, device::Role::kMeet, peer};
        const uint64_t begin_ns = device::globaltimer_ns();
        // The headers may be those of an operation that has failed, which is not this one.
        const bool may_believe = !has_failed(params.comm);
        const bool has_come = await_header(params, site, epoch, &table->headers[peer]);
        is_complete = has_come && may_believe && is_complete;
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
    DEEPCOMM_NO_UNROLL
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
    const Verdict* before = was_called_off(params) ? params.verdict_before : nullptr;
    verdict->mine = before != nullptr ? before->mine : table.headers[params.comm.rank];
    verdict->theirs = Header{};
    if (table.culprit == layout::kNoPeer) return;
    const Header& theirs = table.headers[table.culprit];
    verdict->theirs = theirs;
    verdict->culprit = params.comm.names.of(table.culprit);
    if ((theirs.refusal & kFailedBefore) == 0 || told_by(theirs) != table.status) return;
    verdict->culprit = static_cast<int32_t>(theirs.refusal) >> kCulpritShift;
    // Who was there knows more than the peer that tells. A first stage hears it too, if that peer does
    // not do the same operation.
    if (before != nullptr && before->culprit == verdict->culprit) verdict->theirs = before->theirs;
}

/// By the last thread of a stage, or of one called off: stages after it may begin, and who carries what
/// it was to write need not wait any longer.
DEEPCOMM_DEVICE void end_stage(const MeetParams& params, uint32_t epoch) {
    // ORDER: what the stage has written; pairs with the acquire of the gate
    device::st_release_gpu(&params.verdict->done_epoch, epoch);
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
