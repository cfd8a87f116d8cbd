// SPDX-License-Identifier: Apache-2.0
// Correct uses of single primitives: all of these pass with every seed.
#include "device/device.cuh"
#include "emu/cluster.hpp"
#include "harness.hpp"

namespace deepcomm::testing {

namespace {

using emu::Cluster;
using emu::Fill;
using namespace device;  // NOLINT: these are tests of its names

WaitContext make_context(Cluster& cluster, int rank) {
    auto* record = cluster.alloc<ErrorRecord>(rank, "error_record", 1, Fill::kZero);
    return {record, settings().timeout_ns, rank};
}

constexpr WaitSite kSite = {Operation::kProbe, Role::kReceive, layout::kNoPeer, layout::kNoSlot};

// ---- epoch: three kernels of three blocks count on in device memory

std::string epoch_case(Cluster& cluster) {
    constexpr int kKernels = 3, kBlocks = 3;
    auto* state = cluster.alloc<EpochState>(0, "epoch", 1, Fill::kZero);
    auto* seen = cluster.alloc<uint32_t>(0, "seen", kKernels * kBlocks, Fill::kZero);
    for (int i = 0; i < kKernels; ++i) {
        cluster.launch(0, {kBlocks, 32, 0, [=] {
                               const Block block;
                               const uint32_t epoch = current_epoch(state);
                               block.sync();
                               if (!block.is_leader()) return;
                               seen[(epoch - 1) * kBlocks + blockIdx.x] = epoch;
                               finish_epoch(state, block.num_blocks());
                           }});
    }
    const std::string error = cluster.run();
    if (!error.empty()) return error;
    for (int i = 0; i < kKernels * kBlocks; ++i) {
        DEEPCOMM_EXPECT("seen", i, static_cast<uint32_t>(i / kBlocks) + 1, seen[i]);
    }
    return "";
}

// ---- record: a wait that nobody answers; another rank plays the host that reads the record

std::string record_case(Cluster& cluster) {
    const WaitContext context = make_context(cluster, 0);
    auto* word = cluster.alloc<uint32_t>(0, "word", 1, Fill::kZero);
    auto* copy = cluster.alloc<ErrorRecord>(1, "copy", 1, Fill::kZero);
    cluster.launch(0, {2, 32, 0, [=] {
                           const Block block;
                           const WaitSite site = {Operation::kProbe, Role::kSend, 1, 5};
                           bool is_complete = true;
                           if (block.is_leader()) {
                               is_complete = wait_reached_acquire_sys(context, site, word, 3);
                           }
                           if (block.sync_and(is_complete))
                               red_add_relaxed_sys(word, 100u);  // never: nobody signals
                       }});
    cluster.launch(1, {1, 1, 0, [=] {
                           const auto complete = static_cast<uint32_t>(RecordState::kComplete);
                           while (ld_acquire_sys(&context.record->state) != complete) {
                               pause_on(&context.record->state, emu::kNever);
                           }
                           copy->peer = context.record->peer;
                           copy->slot = context.record->slot;
                           copy->expected = context.record->expected;
                           copy->observed = context.record->observed;
                       }});
    const std::string error = cluster.run();
    if (!error.empty()) return error;
    DEEPCOMM_EXPECT("word", 0, 0u, *word);
    DEEPCOMM_EXPECT("peer", 0, 1u, static_cast<uint64_t>(copy->peer));
    DEEPCOMM_EXPECT("slot", 0, 5u, static_cast<uint64_t>(copy->slot));
    DEEPCOMM_EXPECT("expected", 0, 3u, copy->expected);
    DEEPCOMM_EXPECT("observed", 0, 0u, copy->observed);
    const uint64_t latest_ns = settings().timeout_ns + 100'000;
    if (cluster.statistics().now_ns > latest_ns) return "the wait outlived its deadline";
    return "";
}

// ---- check: one thread fails its check and leaves; the rest of the block goes on without it

std::string check_case(Cluster& cluster) {
    const WaitContext context = make_context(cluster, 0);
    auto* num_left = cluster.alloc<uint32_t>(0, "num_left", 1, Fill::kZero);
    cluster.launch(0, {1, 64, 0, [=] {
                           const Block block;
                           const int32_t idx = block.thread_idx();
                           DEEPCOMM_DEVICE_CHECK(context, kSite, idx != 40, 64, idx);
                           block.sync();
                           red_add_relaxed_gpu(num_left, 1u);
                       }});
    const std::string error = cluster.run();
    if (!error.empty()) return error;
    DEEPCOMM_EXPECT("num_left", 0, 63u, *num_left);
    DEEPCOMM_EXPECT("kind", 0, static_cast<uint64_t>(FailureKind::kCheck),
                    static_cast<uint64_t>(context.record->kind));
    DEEPCOMM_EXPECT("observed", 0, 40u, context.record->observed);
    return "";
}

// ---- collectives of a warp, and memory ordered by its sync

std::string warp_case(Cluster& cluster) {
    auto* words = cluster.alloc<uint32_t>(0, "words", 32);
    auto* results = cluster.alloc<uint32_t>(0, "results", 32);
    cluster.launch(
        0, {1, 32, 0, [=] {
                const Warp warp;
                const int32_t lane = warp.thread_idx();
                const auto value = static_cast<uint32_t>(lane);
                uint32_t sum = value;
                for (int32_t distance = 1; distance < kWarpSize; distance *= 2) {
                    const uint32_t other = warp_shuffle_up(sum, distance);
                    if (lane >= distance) sum += other;
                }
                words[lane] = sum;
                const bool all = warp.sync_and(lane < 40);
                const bool some = warp.sync_and(lane < 31);
                const uint32_t odd = warp_ballot(lane % 2 == 1);
                const uint64_t wide = warp_shuffle((static_cast<uint64_t>(lane) << 40) + 1, 9);
                const uint32_t down = warp_shuffle_down(value, 4);
                uint32_t result = words[lane ^ 1];  // of another lane: ordered by sync_and
                if (!all || some || odd != 0xAAAAAAAAu || wide != (9ull << 40) + 1) result = ~0u;
                if (down != (lane < 28 ? value + 4 : value)) result = ~0u;
                if (warp_shuffle(value, (lane * 7 + 3) % 32) != (value * 7 + 3) % 32) result = ~0u;
                if (warp_match(value % 3) != 0x49249249u << lane % 3) result = ~0u;
                if (lane < 4 && warp_match(value / 2, 0xF) != 3u << lane / 2 * 2) result = ~0u;
                if (warp_sum(value) != 496 || warp_sum(1 - 2 * lane) != -960) result = ~0u;
                if (warp_or(lane % 4 == 0 ? 1u << lane : 0u) != 0x11111111u) result = ~0u;
                results[lane] = result;
            }});
    const std::string error = cluster.run();
    if (!error.empty()) return error;
    for (uint32_t i = 0; i < 32; ++i) {
        const uint32_t lane = i ^ 1;
        DEEPCOMM_EXPECT("results", i, lane * (lane + 1) / 2, results[i]);
    }
    return "";
}

// ---- named barriers: two warps produce, two consume, with a barrier each way

std::string named_barrier_case(Cluster& cluster) {
    constexpr int kRounds = 4;
    struct Smem {
        uint32_t tile[64];
    };
    auto* sums = cluster.alloc<uint32_t>(0, "sums", kRounds * 64);
    cluster.launch(0, {1, 128, sizeof(Smem), [=] {
                           auto& smem = shared_storage<Smem>();
                           const WarpRange producers = {0, 2, 3}, consumers = {2, 2, 3};
                           constexpr int32_t kFull = 1, kEmpty = 2, kBoth = 128;
                           for (uint32_t round = 0; round < kRounds; ++round) {
                               if (producers.contains_me()) {
                                   const int32_t idx = producers.thread_idx();
                                   smem.tile[idx] = round * 100 + static_cast<uint32_t>(idx);
                                   named_barrier(kFull, kBoth);
                                   named_barrier(kEmpty, kBoth);
                               } else {
                                   const int32_t idx = consumers.thread_idx();
                                   named_barrier(kFull, kBoth);
                                   sums[round * 64 + static_cast<uint32_t>(idx)] =
                                       smem.tile[63 - idx];
                                   named_barrier(kEmpty, kBoth);
                               }
                           }
                       }});
    const std::string error = cluster.run();
    if (!error.empty()) return error;
    for (uint32_t i = 0; i < kRounds * 64; ++i) {
        DEEPCOMM_EXPECT("sums", i, i / 64 * 100 + 63 - i % 64, sums[i]);
    }
    return "";
}

// ---- bytes: neighbours write parts of one word, as FP8 rows do

std::string bytes_case(Cluster& cluster) {
    auto* bytes = cluster.alloc<uint8_t>(0, "bytes", 64);
    auto* halves = cluster.alloc<uint16_t>(0, "halves", 33);
    auto* sum = cluster.alloc<uint32_t>(0, "sum", 1);
    cluster.launch(0, {1, 64, 0, [=] {
                           const Block block;
                           const int32_t idx = block.thread_idx();
                           bytes[idx] = static_cast<uint8_t>(idx);
                           if (idx < 33) halves[idx] = static_cast<uint16_t>(idx);
                           block.sync();
                           if (!block.is_leader()) return;
                           uint32_t total = 0;
                           for (int i = 0; i < 64; ++i)
                               total += bytes[i] + (i < 33 ? halves[i] : 0u);
                           *sum = total;
                       }});
    const std::string error = cluster.run();
    if (!error.empty()) return error;
    DEEPCOMM_EXPECT("sum", 0, 63u * 64 / 2 + 32u * 33 / 2, *sum);
    return "";
}

// ---- kernel boundaries order everything of a rank; the host's barrier orders ranks

std::string kernel_boundary_case(Cluster& cluster) {
    struct alignas(128) Smem {
        uint32_t tile[32];
    };
    auto* row = cluster.alloc<uint32_t>(0, "row", 32);
    auto* counter = cluster.alloc<uint32_t>(0, "counter", 1, Fill::kZero);
    auto* copy = cluster.alloc<uint32_t>(1, "copy", 32);
    cluster.launch(0, {1, 32, sizeof(Smem), [=] {
                           auto& smem = shared_storage<Smem>();
                           const Block block;
                           smem.tile[block.thread_idx()] = 5;
                           fence_proxy_async();
                           block.sync();
                           red_add_relaxed_gpu(counter, 1u);
                           if (!block.is_leader()) return;
                           bulk_store(row, smem.tile, sizeof smem.tile);
                           bulk_commit_group();
                           bulk_wait_group_read<
                               0>();  // shared memory may go; the kernel's end waits for the writes
                       }});
    cluster.launch(0, {1, 32, 0, [=] {
                           row[threadIdx.x] += threadIdx.x;
                           if (threadIdx.x == 0)
                               *counter = 0;  // a plain reset of a word that atomics used
                       }});
    cluster.launch(1, {1, 1, 0, [] {}});
    cluster.host_barrier();
    cluster.launch(
        1, {1, 32, 0, [=] { copy[threadIdx.x] = row[threadIdx.x] + ld_relaxed_sys(counter); }});
    const std::string error = cluster.run();
    if (!error.empty()) return error;
    for (uint32_t i = 0; i < 32; ++i) DEEPCOMM_EXPECT("copy", i, 5 + i, copy[i]);
    return "";
}

// ---- padding: copies may carry undefined bytes as long as nobody reads them

std::string padding_case(Cluster& cluster) {
    struct alignas(128) Smem {
        uint32_t tile[8];
    };
    auto* row = cluster.alloc<uint32_t>(0, "row", 8);
    auto* first = cluster.alloc<uint32_t>(0, "first", 1);
    cluster.launch(0, {1, 1, sizeof(Smem), [=] {
                           auto& smem = shared_storage<Smem>();
                           smem.tile[0] = 7;
                           fence_proxy_async();
                           bulk_store(row, smem.tile, sizeof smem.tile);
                           bulk_commit_group();
                           bulk_wait_group<0>();
                           *first = row[0];
                       }});
    const std::string error = cluster.run();
    if (!error.empty()) return error;
    DEEPCOMM_EXPECT("first", 0, 7u, *first);
    return "";
}

// ---- proxies: plain stores to a peer's memory, signalled, then read there by a bulk copy. The
// proxy fence may stand on either side of the signal.

std::string proxy_case(Cluster& cluster, bool fence_by_writer) {
    struct alignas(128) Smem {
        uint32_t tile[32];
        Mbarrier mbarrier;
    };
    auto* row = cluster.alloc<uint32_t>(1, "row", 32);
    auto* signal = cluster.alloc<uint32_t>(1, "signal", 1, Fill::kZero);
    auto* copy = cluster.alloc<uint32_t>(1, "copy", 32);
    const WaitContext context = make_context(cluster, 1);
    const auto write = [=] {
        row[threadIdx.x] = 100 + threadIdx.x;
        if (fence_by_writer) fence_proxy_async();
        block_barrier();
        if (threadIdx.x == 0) st_release_sys(signal, 1u);
    };
    const auto read = [=] {
        auto& smem = shared_storage<Smem>();
        if (threadIdx.x == 0) {
            mbarrier_init(&smem.mbarrier, 1);
            fence_mbarrier_init();
        }
        block_barrier();
        if (threadIdx.x == 0 && wait_reached_acquire_sys(context, kSite, signal, 1)) {
            if (!fence_by_writer) fence_proxy_async();
            bulk_load(smem.tile, row, sizeof smem.tile, &smem.mbarrier);
            mbarrier_arrive_expect_tx(&smem.mbarrier, sizeof smem.tile);
        }
        if (!wait_mbarrier(context, kSite, &smem.mbarrier, 0)) return;
        copy[threadIdx.x] = smem.tile[threadIdx.x];
    };
    cluster.launch(0, {1, 32, 0, write});
    cluster.launch(1, {1, 32, sizeof(Smem), read});
    const std::string error = cluster.run();
    if (!error.empty()) return error;
    for (uint32_t i = 0; i < 32; ++i) DEEPCOMM_EXPECT("copy", i, 100 + i, copy[i]);
    return "";
}

std::string proxy_fence_by_writer_case(Cluster& cluster) { return proxy_case(cluster, true); }

std::string proxy_fence_by_reader_case(Cluster& cluster) { return proxy_case(cluster, false); }

// ---- mbarrier that completes when lanes have given it up and meet elsewhere

std::string mbarrier_late_case(Cluster& cluster) {
    const WaitContext context = {nullptr, 1'000, 0};
    auto* sums = cluster.alloc<uint32_t>(0, "sums", 32, Fill::kZero);
    cluster.launch(0, {1, 64, sizeof(Mbarrier), [=] {
                           const Block block;
                           const Warp warp;
                           auto& late = shared_storage<Mbarrier>();
                           if (block.is_leader()) mbarrier_init(&late, 1);
                           block.sync();
                           if (warp.warp_idx() == 1) {
                               sleep_ns(4'000);
                               if (warp.is_leader()) mbarrier_arrive(&late);
                               return;
                           }
                           if (warp.is_leader()) sleep_ns(8'000);
                           const bool is_there = wait_mbarrier(context, kSite, &late, 0);
                           (void)warp.sync_and(is_there);
                           sums[warp.thread_idx()] = warp_shuffle(is_there ? 1u : 0u, 0);
                       }});
    const std::string error = cluster.run();
    if (!error.empty()) return error;
    for (int lane = 0; lane < 32; ++lane) DEEPCOMM_EXPECT("sums", lane, 1u, sums[lane]);
    return "";
}

// ---- rails: two puts and a signal on one context; the source is reused after a flush

std::string rail_case(Cluster& cluster) {
    auto* source = cluster.alloc<uint32_t>(0, "source", 16, Fill::kZero);
    auto* landing = cluster.alloc<uint32_t>(1, "landing", 32);
    auto* signal = cluster.alloc<uint64_t>(1, "signal", 1, Fill::kZero);
    auto* sum = cluster.alloc<uint32_t>(1, "sum", 1);
    const WaitContext context = make_context(cluster, 1);
    cluster.launch(0, {1, 32, 0, [=] {
                           const RailPeer peer = {0, 1};
                           const auto lane = static_cast<uint32_t>(Warp{}.thread_idx());
                           if (lane < 16) source[lane] = lane;
                           rail_put(peer, landing, source, 64);
                           rail_flush(peer.context);
                           if (lane < 16) source[lane] = 100 + lane;
                           rail_put(peer, landing + 16, source, 64);
                           rail_signal_add(peer, signal, 1);
                       }});
    cluster.launch(1, {1, 1, 0, [=] {
                           const bool has_arrived =
                               wait_until(context, kSite, 1, signal, [=]() -> Observed {
                                   const uint64_t value = ld_acquire_sys(signal);
                                   return {value, value == 1};
                               });
                           if (!has_arrived) return;
                           uint32_t total = 0;
                           for (uint32_t i = 0; i < 32; ++i) total += landing[i];
                           *sum = total;
                       }});
    const std::string error = cluster.run();
    if (!error.empty()) return error;
    DEEPCOMM_EXPECT("sum", 0, 120u + 120 + 1600, *sum);
    return "";
}

const Register kEpoch("epoch", 1, epoch_case);
const Register kRecord("record", 2, record_case);
const Register kCheck("check", 1, check_case);
const Register kWarp("warp", 1, warp_case);
const Register kNamedBarrier("named_barrier", 1, named_barrier_case);
const Register kBytes("bytes", 1, bytes_case);
const Register kKernelBoundary("kernel_boundary", 2, kernel_boundary_case);
const Register kPadding("padding", 1, padding_case);
const Register kProxyWriter("proxy_fence_by_writer", 2, proxy_fence_by_writer_case);
const Register kProxyReader("proxy_fence_by_reader", 2, proxy_fence_by_reader_case);
const Register kMbarrierLate("mbarrier_late", 1, mbarrier_late_case);
const Register kRail("rail", 2, rail_case);

}  // namespace

}  // namespace deepcomm::testing
