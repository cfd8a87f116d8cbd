// SPDX-License-Identifier: Apache-2.0
// The litmus suite: each probe kernel, from the sources that the GPU runs, on a small cluster.
#include "emu/cluster.hpp"
#include "harness.hpp"
#include "kernels/probe/probe.cuh"

namespace deepcomm::testing {

namespace {

using emu::Cluster;
using emu::Fill;
using kernels::ProbeParams;

ProbeParams ring_of_ranks(Cluster& cluster, int rank, int num_rounds, int num_words) {
    const int num_ranks = cluster.num_ranks();
    ProbeParams probe{};
    probe.rank = rank;
    probe.dst_rank = (rank + 1) % num_ranks;
    probe.src_rank = (rank + num_ranks - 1) % num_ranks;
    probe.num_rounds = num_rounds;
    probe.num_words = num_words;
    probe.timeout_ns = settings().timeout_ns;
    probe.record = cluster.alloc<layout::ErrorRecord>(rank, "error_record", 1, Fill::kZero);
    return probe;
}

const char* role_name(layout::Role role) {
    constexpr const char* kNames[] = {"count", "send", "receive", "reduce", "forward", "meet"};
    return kNames[static_cast<int>(role)];
}

/// "timeout: rank 1 receive peer 0 slot 2 expected 4 observed 3", for every record that is filled.
std::string describe_records(const std::vector<ProbeParams>& probes) {
    std::string text;
    for (const ProbeParams& probe : probes) {
        const layout::ErrorRecord& record = *probe.record;
        if (record.state == static_cast<uint32_t>(layout::RecordState::kClear)) continue;
        const bool is_timeout = record.kind == layout::FailureKind::kTimeout;
        text += format("%s%s: rank %d %s peer %d slot %d expected %zu observed %zu",
                       text.empty() ? "" : "; ", is_timeout ? "timeout" : "check", record.rank,
                       role_name(record.role), record.peer, record.slot,
                       static_cast<size_t>(record.expected), static_cast<size_t>(record.observed));
    }
    return text;
}

std::string run_and_describe(Cluster& cluster, const std::vector<ProbeParams>& probes) {
    const std::string error = cluster.run();
    return error.empty() ? describe_records(probes) : error;
}

// ---- probe_signal: 2 blocks of 64 threads on each of 3 ranks

std::string signal_case(Cluster& cluster) {
    const int num_ranks = cluster.num_ranks();
    constexpr int kRounds = 2, kWords = 96, kBlocks = 2;
    std::vector<ProbeParams> probes;
    std::vector<kernels::SignalParams> all(static_cast<size_t>(num_ranks));
    std::vector<uint32_t*> payloads, signals;
    for (int rank = 0; rank < num_ranks; ++rank) {
        probes.push_back(ring_of_ranks(cluster, rank, kRounds, kWords));
        payloads.push_back(cluster.alloc<uint32_t>(rank, "payload", kRounds * kWords));
        signals.push_back(cluster.alloc<uint32_t>(rank, "signal", 1, Fill::kZero));
    }
    for (size_t rank = 0; rank < all.size(); ++rank) {
        const ProbeParams& probe = probes[rank];
        const auto dst = static_cast<size_t>(probe.dst_rank);
        auto* sums = cluster.alloc<uint32_t>(probe.rank, "sums", kRounds * kBlocks, Fill::kZero);
        all[rank] = {probe, payloads[dst], signals[dst], payloads[rank], signals[rank], sums};
        cluster.launch(probe.rank,
                       {kBlocks, 64, 0, [params = all[rank]] { kernels::probe_signal(params); }});
    }
    const std::string error = run_and_describe(cluster, probes);
    if (!error.empty()) return error;
    for (const kernels::SignalParams& params : all) {
        for (int i = 0; i < kRounds * kBlocks; ++i) {
            uint32_t expected = 0;
            for (int word = 0; word < kWords; ++word) {
                expected += kernels::probe_payload(params.probe.src_rank,
                                                   static_cast<uint32_t>(i / kBlocks), word);
            }
            DEEPCOMM_EXPECT("sums", i, expected, params.sums[i]);
        }
    }
    return "";
}

// ---- probe_claim: 32 claims of two ranks, one a thread

std::string claim_case(Cluster& cluster) {
    constexpr int kRounds = 32;
    auto* owners = cluster.alloc<uint32_t>(0, "owners", kRounds, Fill::kZero);
    uint32_t* claims[2];
    std::vector<ProbeParams> probes;
    for (int rank = 0; rank < 2; ++rank) {
        claims[rank] = cluster.alloc<uint32_t>(rank, "claims", kRounds, Fill::kZero);
        probes.push_back(ring_of_ranks(cluster, rank, kRounds, 0));
    }
    for (int rank = 0; rank < 2; ++rank) {
        const kernels::ClaimParams params = {probes[static_cast<size_t>(rank)], claims[rank],
                                             claims[1 - rank], owners};
        cluster.launch(rank, {1, kRounds, 0, [params] { kernels::probe_claim(params); }});
    }
    const std::string error = run_and_describe(cluster, probes);
    if (!error.empty()) return error;
    for (int i = 0; i < kRounds; ++i) note(owners[i] == 0 ? "nobody entered" : "one entered");
    return "";
}

// ---- probe_bulk_put: 2 blocks of 32 threads on each of 2 ranks, 7 tiles through 2 stages

std::string bulk_put_case(Cluster& cluster) {
    const int num_ranks = cluster.num_ranks();
    constexpr int kTiles = 7, kWords = kTiles * kernels::kTileWords;
    std::vector<ProbeParams> probes;
    std::vector<uint32_t*> sources, received, signals, copies;
    for (int rank = 0; rank < num_ranks; ++rank) {
        probes.push_back(ring_of_ranks(cluster, rank, 1, 0));
        sources.push_back(cluster.alloc<uint32_t>(rank, "source", kWords, Fill::kZero));
        received.push_back(cluster.alloc<uint32_t>(rank, "received", kWords));
        signals.push_back(cluster.alloc<uint32_t>(rank, "signal", 1, Fill::kZero));
        copies.push_back(cluster.alloc<uint32_t>(rank, "copy", kWords));
        for (int i = 0; i < kWords; ++i) sources.back()[i] = kernels::probe_payload(rank, 0, i);
    }
    for (size_t rank = 0; rank < probes.size(); ++rank) {
        const auto dst = static_cast<size_t>(probes[rank].dst_rank);
        const kernels::BulkPutParams params = {probes[rank], sources[rank],  received[dst],
                                               signals[dst], received[rank], signals[rank],
                                               copies[rank], kTiles};
        cluster.launch(static_cast<int>(rank), {2, 32, sizeof(kernels::BulkPutShared),
                                                [params] { kernels::probe_bulk_put(params); }});
    }
    const std::string error = run_and_describe(cluster, probes);
    if (!error.empty()) return error;
    for (size_t rank = 0; rank < probes.size(); ++rank) {
        for (int i = 0; i < kWords; ++i) {
            DEEPCOMM_EXPECT("copy", i, kernels::probe_payload(probes[rank].src_rank, 0, i) + 7,
                            copies[rank][i]);
        }
    }
    return "";
}

// ---- probe_bulk_copy: 2 warps on each of 2 ranks, 6 tiles each through 4 stages

std::string bulk_copy_case(Cluster& cluster) {
    const int num_ranks = cluster.num_ranks();
    constexpr int kTiles = 12, kTileBytes = 64, kWords = kTiles * kTileBytes / 4;
    std::vector<ProbeParams> probes;
    std::vector<uint32_t*> sources, received, signals, copies;
    for (int rank = 0; rank < num_ranks; ++rank) {
        probes.push_back(ring_of_ranks(cluster, rank, 1, kWords));
        sources.push_back(cluster.alloc<uint32_t>(rank, "source", kWords, Fill::kZero));
        received.push_back(cluster.alloc<uint32_t>(rank, "received", kWords));
        signals.push_back(cluster.alloc<uint32_t>(rank, "signal", 1, Fill::kZero));
        copies.push_back(cluster.alloc<uint32_t>(rank, "copy", kWords));
        for (int i = 0; i < kWords; ++i) sources.back()[i] = kernels::probe_payload(rank, 0, i);
    }
    for (size_t rank = 0; rank < probes.size(); ++rank) {
        const auto dst = static_cast<size_t>(probes[rank].dst_rank);
        const auto* src = reinterpret_cast<unsigned char*>(sources[rank]);
        auto* to = reinterpret_cast<unsigned char*>(received[dst]);
        const kernels::BulkCopyParams params = {
            probes[rank],  src,          to,     signals[dst], received[rank],
            signals[rank], copies[rank], kTiles, kTiles,       kTileBytes};
        cluster.launch(static_cast<int>(rank), {1, 64, sizeof(kernels::BulkCopyShared),
                                                [params] { kernels::probe_bulk_copy(params); }});
    }
    const std::string error = run_and_describe(cluster, probes);
    if (!error.empty()) return error;
    for (size_t rank = 0; rank < probes.size(); ++rank) {
        for (int i = 0; i < kWords; ++i) {
            DEEPCOMM_EXPECT("copy", i, kernels::probe_payload(probes[rank].src_rank, 0, i),
                            copies[rank][i]);
        }
    }
    return "";
}

// ---- probe_ring: a sender and a receiver block a rank, 6 rounds through 2 slots, over the wrap

std::string ring_case(Cluster& cluster) {
    const int num_ranks = cluster.num_ranks();
    constexpr int kRounds = 6, kWords = 64, kSlots = 2;
    constexpr uint32_t kFirstEpoch = 0xFFFFFFFDu;
    std::vector<ProbeParams> probes;
    std::vector<kernels::RingParams> all;
    for (int rank = 0; rank < num_ranks; ++rank) {
        probes.push_back(ring_of_ranks(cluster, rank, kRounds, kWords));
        kernels::RingParams params{};
        auto* words = cluster.alloc<uint32_t>(rank, "slots", kSlots * kWords);
        auto* counters = cluster.alloc<uint32_t>(rank, "counters", 2, Fill::kZero);
        counters[0] = counters[1] = kFirstEpoch;
        params.probe = probes.back();
        params.first_epoch = kFirstEpoch;
        params.slots = words;
        params.tail = counters;
        params.head = counters + 1;
        params.folds = cluster.alloc<uint32_t>(rank, "folds", kRounds * kWords);
        params.num_slots = kSlots;
        all.push_back(params);
    }
    for (kernels::RingParams& params : all) {
        const kernels::RingParams& dst = all[static_cast<size_t>(params.probe.dst_rank)];
        const kernels::RingParams& src = all[static_cast<size_t>(params.probe.src_rank)];
        params.dst_slots = const_cast<uint32_t*>(dst.slots);
        params.dst_tail = const_cast<uint32_t*>(dst.tail);
        params.src_head = const_cast<uint32_t*>(src.head);
        cluster.launch(params.probe.rank, {2, 32, 0, [params] { kernels::probe_ring(params); }});
    }
    const std::string error = run_and_describe(cluster, probes);
    if (!error.empty()) return error;
    for (const kernels::RingParams& params : all) {
        for (int i = 0; i < kRounds * kWords; ++i) {
            const auto round = static_cast<uint32_t>(i / kWords);
            const uint32_t word = kernels::probe_payload(params.probe.src_rank, round, i % kWords);
            DEEPCOMM_EXPECT("folds", i, kernels::fold(word, kFirstEpoch + round + 1),
                            params.folds[i]);
        }
    }
    return "";
}

// ---- probe_barrier_fold: 1 or 2 blocks of 32 threads on each of 3 ranks take turns

std::string fold_in_turns(Cluster& cluster, int num_rounds, int num_blocks) {
    const int num_ranks = cluster.num_ranks();
    auto* accumulator = cluster.alloc<uint32_t>(0, "accumulator", 1, Fill::kZero);
    std::vector<ProbeParams> probes;
    kernels::BarrierFoldParams params{};
    for (int rank = 0; rank < num_ranks; ++rank) {
        probes.push_back(ring_of_ranks(cluster, rank, num_rounds, 0));
        params.barrier_words[rank] = cluster.alloc<uint32_t>(
            rank, "barrier_words", static_cast<size_t>(num_ranks), Fill::kZero);
    }
    params.accumulator = accumulator;
    params.num_ranks = num_ranks;
    for (int rank = 0; rank < num_ranks; ++rank) {
        params.probe = probes[static_cast<size_t>(rank)];
        params.grid_state = cluster.alloc<device::GridBarrierState>(rank, "grid", 1, Fill::kZero);
        cluster.launch(rank,
                       {num_blocks, 32, 0, [params] { kernels::probe_barrier_fold(params); }});
    }
    const std::string error = run_and_describe(cluster, probes);
    if (!error.empty()) return error;
    uint32_t expected = 0;
    for (int turn = 0; turn < num_rounds * num_ranks * num_blocks; ++turn) {
        expected =
            kernels::fold(expected, static_cast<uint32_t>(turn % (num_ranks * num_blocks)) + 1);
    }
    DEEPCOMM_EXPECT("accumulator", 0, expected, *accumulator);
    return "";
}

std::string barrier_fold_case(Cluster& cluster) { return fold_in_turns(cluster, 1, 2); }

std::string barrier_fold_one_block_case(Cluster& cluster) { return fold_in_turns(cluster, 2, 1); }

// ---- probe_packet: 48 packets both ways between two ranks, 5 rounds in 2 copies

std::string packet_case(Cluster& cluster) {
    constexpr int kRounds = 5, kPackets = 48;
    std::vector<ProbeParams> probes;
    device::Vec128* packets[2];
    uint32_t* sums[2];
    for (int rank = 0; rank < 2; ++rank) {
        probes.push_back(ring_of_ranks(cluster, rank, kRounds, 0));
        packets[rank] = cluster.alloc<device::Vec128>(rank, "packets", 2 * kPackets, Fill::kZero);
        sums[rank] = cluster.alloc<uint32_t>(rank, "sums", kRounds * kPackets);
    }
    for (int rank = 0; rank < 2; ++rank) {
        const kernels::PacketParams params = {probes[static_cast<size_t>(rank)], packets[1 - rank],
                                              packets[rank], sums[rank], kPackets};
        cluster.launch(rank, {1, 32, 0, [params] { kernels::probe_packet(params); }});
    }
    const std::string error = run_and_describe(cluster, probes);
    if (!error.empty()) return error;
    for (int i = 0; i < 2 * kRounds * kPackets; ++i) {
        const int rank = i / (kRounds * kPackets), at = i % (kRounds * kPackets);
        const auto round = static_cast<uint32_t>(at / kPackets) + 1;
        const uint32_t word = kernels::probe_payload(1 - rank, round, at % kPackets);
        DEEPCOMM_EXPECT("sums", at, 3 * word + 3, sums[rank][at]);
    }
    return "";
}

const Register kSignal("signal", 3, signal_case);
const Register kSignalLarge("signal_large", 8, signal_case);
const Register kClaim("claim", 2, claim_case);
const Register kBulkPut("bulk_put", 2, bulk_put_case);
const Register kBulkPutLarge("bulk_put_large", 8, bulk_put_case);
const Register kBulkCopy("bulk_copy", 2, bulk_copy_case);
const Register kRing("ring", 2, ring_case);
const Register kBarrierFold("barrier_fold", 3, barrier_fold_case);
const Register kBarrierFoldOne("barrier_fold_one_block", 3, barrier_fold_one_block_case);
const Register kPacket("packet", 2, packet_case);

}  // namespace

}  // namespace deepcomm::testing
