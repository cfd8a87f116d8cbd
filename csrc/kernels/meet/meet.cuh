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
    return {comm.record, comm.timeout_ns, comm.rank};
}

DEEPCOMM_DEVICE device::Vec128* header_at(const MeetParams& params, uint32_t epoch, int32_t dst,
                                          int32_t src) {
    return reinterpret_cast<device::Vec128*>(params.comm.bases[dst] +
                                             params.layout.header(epoch, src));
}

/// By one thread, before it publishes: an earlier operation's trouble that the host has not raised yet
/// is a reason to refuse one that all hosts wait for. They then raise in the same call.
DEEPCOMM_DEVICE uint32_t earlier_refusal(const MeetParams& params) {
    uint64_t* has_trouble = &params.counters->has_trouble;
    if (!params.host_waits || device::ld_relaxed_gpu(has_trouble) == 0) return 0;
    const auto clear = static_cast<uint32_t>(layout::RecordState::kClear);
    if (device::ld_relaxed_sys(&params.trouble->state) != clear) return kUnraisedTrouble;
    device::st_relaxed_gpu(has_trouble, 0);
    return 0;
}

/// By one group; refusal is added to the host's.
template <typename Group>
DEEPCOMM_DEVICE void publish_header(const MeetParams& params, const Group& group, uint32_t epoch,
                                    uint32_t refusal) {
    const Header& mine = params.header;
    const device::Vec128 first = {{mine.signature, static_cast<uint32_t>(mine.capacity),
                                   static_cast<uint32_t>(mine.num_tokens), epoch}};
    const device::Vec128 second = {
        {mine.landing, static_cast<uint32_t>(mine.alignment), mine.refusal | refusal, epoch}};
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

DEEPCOMM_DEVICE bool await_header(const MeetParams& params, const device::WaitSite& site,
                                  uint32_t epoch, Header* header) {
    const device::Vec128* packets = header_at(params, epoch, params.comm.rank, site.peer);
    const device::WaitContext context = wait_context(params.comm);
    device::Vec128 first{}, second{};
    if (!await_packet(context, site, packets, epoch, &first)) return false;
    if (!await_packet(context, site, packets + 1, epoch, &second)) return false;
    *header = {first.words[0],
               static_cast<int32_t>(first.words[1]),
               static_cast<int32_t>(first.words[2]),
               second.words[0],
               static_cast<int32_t>(second.words[1]),
               second.words[2]};
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
        if (table->headers[rank].refusal == 0) continue;
        table->status = MeetStatus::kRefused;
        table->culprit = rank;
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

/// By one thread of one block: lets the host know of an operation that does not take place, unless it
/// is itself the reason.
template <int32_t kNumRanks>
DEEPCOMM_DEVICE void report_trouble(const MeetParams& params, const MeetTable<kNumRanks>& table) {
    if (params.header.refusal != 0) return;
    Trouble* trouble = params.trouble;
    const auto clear = static_cast<uint32_t>(layout::RecordState::kClear);
    const auto writing = static_cast<uint32_t>(layout::RecordState::kWriting);
    if (device::atom_cas_relaxed_sys(&trouble->state, clear, writing) != clear) return;
    const int32_t culprit = table.culprit == layout::kNoPeer ? params.comm.rank : table.culprit;
    device::st_relaxed_gpu(&params.counters->has_trouble, 1);
    trouble->status = table.status;
    trouble->culprit = table.culprit;
    trouble->max_tokens = table.most_tokens;
    trouble->mine = table.headers[params.comm.rank];
    trouble->theirs = table.headers[culprit];
    // ORDER: the fields above; pairs with the host's acquire of kComplete
    device::st_release_sys(&trouble->state, static_cast<uint32_t>(layout::RecordState::kComplete));
}

}  // namespace deepcomm::kernels
