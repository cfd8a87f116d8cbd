// SPDX-License-Identifier: Apache-2.0
// Wrong uses of single primitives: each is reported, by a message that names what is wrong.
#include "device/device.cuh"
#include "emu/cluster.hpp"
#include "harness.hpp"

namespace deepcomm::testing {

namespace {

using emu::Cluster;
using emu::Fill;
using namespace device;  // NOLINT: these are tests of its names

/// Memory that every case finds: words on rank 0, defined and undefined, and shared memory.
struct Words {
    uint32_t* zeros;   ///< [16], defined
    uint32_t* poison;  ///< [16], never written
    uint64_t* wide;    ///< [2], defined
};

struct alignas(128) Smem {
    uint32_t tile[32];
    Mbarrier mbarrier;
};

using Kernel = void (*)(const Words&);

CaseBody misuse(int block, Kernel kernel) {
    return [=](Cluster& cluster) {
        const Words words = {cluster.alloc<uint32_t>(0, "zeros", 16, Fill::kZero),
                             cluster.alloc<uint32_t>(0, "poison", 16),
                             cluster.alloc<uint64_t>(0, "wide", 2, Fill::kZero)};
        for (int rank = 0; rank < cluster.num_ranks(); ++rank) {
            cluster.launch(rank, {1, block, sizeof(Smem), [=] { kernel(words); }});
        }
        return cluster.run();
    };
}

uint32_t idx() { return threadIdx.x; }

// ---- races and bounds

const Register kRaceWrite("race_write", 1, misuse(2, [](const Words& w) { w.zeros[0] = idx(); }));
const Register kRaceRead("race_read", 1, misuse(2, [](const Words& w) {
                             if (idx() == 0)
                                 w.zeros[0] = 1;
                             else
                                 w.zeros[1] = w.zeros[0];
                         }));
const Register kRaceByte("race_byte", 1, misuse(2, [](const Words& w) {
                             auto* bytes = reinterpret_cast<uint8_t*>(w.zeros);
                             bytes[0] = 1;          // both threads
                             bytes[1 + idx()] = 2;  // no race: neighbours
                         }));
struct Wide {
    uint32_t words[6];
};
const Register kRaceStruct("race_struct", 1, misuse(2, [](const Words& w) {
                               auto* rows = reinterpret_cast<Wide*>(w.zeros);
                               if (idx() == 0) rows[1] = rows[0];  // larger than any register
                               if (idx() == 1) w.zeros[11] = 3;
                           }));
const Register kRaceScopeBlock("race_block_scope_across_blocks", 1, [](Cluster& cluster) {
    auto* flag = cluster.alloc<uint32_t>(0, "flag", 1, Fill::kZero);
    cluster.launch(0, {2, 1, 0, [=] {
                           if (blockIdx.x == 0) st_release_block(flag, 1u);
                           if (blockIdx.x == 1) (void)ld_acquire_block(flag);
                       }});
    return cluster.run();
});
const Register kRaceWarp("race_ballot_orders_nothing", 1, misuse(32, [](const Words& w) {
                             if (idx() == 0) w.zeros[0] = 1;
                             (void)warp_ballot(true);
                             if (idx() == 1) w.zeros[1] = w.zeros[0];
                         }));
const Register kRacePoll("race_plain_poll", 1, misuse(2, [](const Words& w) {
                             if (idx() == 0)
                                 st_release_gpu(w.zeros, 1u);
                             else
                                 w.zeros[1] = w.zeros[0];  // a flag read by a plain load
                         }));
const Register kRaceScope("race_narrow_scope", 2, misuse(1, [](const Words& w) {
                              atom_add_acq_rel_gpu(w.zeros,
                                                   1u);  // two ranks: gpu scope does not reach
                          }));
const Register kBehind("behind_the_end", 1, misuse(1, [](const Words& w) { w.zeros[16] = 1; }));
const Register kBehindShared("behind_shared_memory", 1, misuse(1, [](const Words&) {
                                 auto& smem = shared_storage<Smem>();
                                 smem.tile[sizeof(Smem) / 4 + 1] = 1;
                             }));
const Register kSharedTooSmall("shared_memory_too_small", 1, misuse(1, [](const Words&) {
                                   struct Larger {
                                       char bytes[sizeof(Smem) + 128];
                                   };
                                   shared_storage<Larger>().bytes[0] = 1;
                               }));
const Register kUndefined("undefined_global", 1,
                          misuse(1, [](const Words& w) { w.zeros[0] = w.poison[3]; }));
const Register kUndefinedShared("undefined_shared", 1, misuse(1, [](const Words& w) {
                                    w.zeros[0] = shared_storage<Smem>().tile[3];
                                }));
const Register kForeignStack("another_threads_local", 1, misuse(2, [](const Words& w) {
                                 uint32_t local = idx();
                                 if (idx() == 0) *w.wide = reinterpret_cast<uint64_t>(&local);
                                 block_barrier();
                                 if (idx() == 1) *reinterpret_cast<uint32_t*>(*w.wide) = 5;
                                 block_barrier();
                                 w.zeros[idx()] = local;
                             }));
const Register kMixed("mixed_sizes", 1, misuse(1, [](const Words& w) {
                          st_relaxed_gpu(w.wide, uint64_t{1});
                          (void)ld_relaxed_gpu(reinterpret_cast<uint32_t*>(w.wide));
                      }));
const Register kMisaligned("misaligned", 1, misuse(1, [](const Words& w) {
                               auto* odd = reinterpret_cast<uint64_t*>(w.zeros + 1);
                               st_relaxed_gpu(odd, uint64_t{1});
                           }));

// ---- meetings

const Register kMaskMismatch("mask_mismatch", 1, misuse(32, [](const Words&) {
                                 (void)warp_ballot(true, idx() == 3 ? 0xFFFFu : kFullMask);
                             }));
const Register kOwnLane("mask_without_own_lane", 1,
                        misuse(32, [](const Words&) { (void)warp_ballot(true, 0xFFFFFFFEu); }));
const Register kDivergent("divergent_collectives", 1, misuse(32, [](const Words&) {
                              if (idx() == 0)
                                  warp_sync();
                              else
                                  (void)warp_ballot(true);
                          }));
const Register kBarrierCounts("barrier_counts_differ", 1, misuse(64, [](const Words&) {
                                  named_barrier(1, idx() < 32 ? 64 : 32);
                              }));
const Register kDeadlockBarrier("deadlock_named_barrier", 1, misuse(64, [](const Words&) {
                                    if (idx() < 32) named_barrier(1, 64);
                                }));
const Register kDeadlockWords("deadlock_crossed_waits", 2, misuse(1, [](const Words& w) {
                                  const int rank = atom_add_acq_rel_sys(w.zeros, 1u) == 0 ? 0 : 1;
                                  uint32_t* mine = w.zeros + 1 + rank;
                                  while (ld_acquire_sys(mine) == 0) pause_on(mine, emu::kNever);
                                  st_release_sys(w.zeros + 2 - rank, 1u);
                              }));
const Register kLivelock("livelock_raw_spin", 1, misuse(1, [](const Words& w) {
                             while (ld_acquire_sys(w.zeros) == 0) {
                             }
                         }));

// ---- bulk copies

void init_mbarrier(Smem& smem) {
    if (idx() == 0) {
        mbarrier_init(&smem.mbarrier, 1);
        fence_mbarrier_init();
    }
    block_barrier();
}

void wait_for_tile(Smem& smem) {
    while (!mbarrier_try_wait(&smem.mbarrier, 0)) pause_on(&smem.mbarrier, emu::kNever);
}

const Register kBulkSize("bulk_size", 1, misuse(1, [](const Words& w) {
                             auto& smem = shared_storage<Smem>();
                             init_mbarrier(smem);
                             bulk_load(smem.tile, w.zeros, 20, &smem.mbarrier);
                         }));
const Register kBulkBounds("bulk_bounds", 1, misuse(1, [](const Words& w) {
                               auto& smem = shared_storage<Smem>();
                               init_mbarrier(smem);
                               bulk_load(smem.tile, w.zeros, 128,
                                         &smem.mbarrier);  // 64 bytes are there
                           }));
const Register kBulkNoWait("bulk_load_not_awaited", 1, misuse(32, [](const Words& w) {
                               auto& smem = shared_storage<Smem>();
                               init_mbarrier(smem);
                               if (idx() == 0) {
                                   bulk_load(smem.tile, w.zeros, 64, &smem.mbarrier);
                                   mbarrier_arrive_expect_tx(&smem.mbarrier, 64);
                               }
                               if (idx() != 5) wait_for_tile(smem);
                               if (idx() == 5) w.zeros[1] = smem.tile[idx()];
                               block_barrier();
                           }));
const Register kBulkExpect("bulk_expected_before_issued", 1, misuse(1, [](const Words& w) {
                               auto& smem = shared_storage<Smem>();
                               init_mbarrier(smem);
                               mbarrier_arrive_expect_tx(&smem.mbarrier, 64);
                               bulk_load(smem.tile, w.zeros, 64, &smem.mbarrier);
                           }));
const Register kBulkExit("bulk_exit_before_read", 1, misuse(1, [](const Words& w) {
                             auto& smem = shared_storage<Smem>();
                             for (uint32_t i = 0; i < 16; ++i) smem.tile[i] = i;
                             fence_proxy_async();
                             bulk_store(w.zeros, smem.tile, 64);
                             bulk_commit_group();
                         }));
const Register kBulkReuse("bulk_source_reused", 1, misuse(1, [](const Words& w) {
                              auto& smem = shared_storage<Smem>();
                              for (uint32_t i = 0; i < 16; ++i) smem.tile[i] = i;
                              fence_proxy_async();
                              bulk_store(w.zeros, smem.tile, 64);
                              bulk_commit_group();
                              smem.tile[0] = 5;
                              bulk_wait_group<0>();
                          }));
const Register kBulkFlag("bulk_flag_polled", 1, misuse(2, [](const Words& w) {
                             auto& smem = shared_storage<Smem>();
                             if (idx() == 0) {
                                 for (uint32_t i = 0; i < 16; ++i) smem.tile[i] = 1;
                                 fence_proxy_async();
                                 bulk_store(w.zeros, smem.tile,
                                            64);  // a flag must not travel by a bulk copy
                                 bulk_commit_group();
                                 bulk_wait_group<0>();
                             } else {
                                 while (ld_acquire_sys(w.zeros + 15) == 0)
                                     pause_on(w.zeros + 15, emu::kNever);
                             }
                         }));
const Register kBulkProxy(
    "bulk_load_without_proxy_fence", 1, misuse(1, [](const Words& w) {
        auto& smem = shared_storage<Smem>();
        init_mbarrier(smem);
        w.zeros[0] = 1;  // a plain store, then an asynchronous read of it by the same thread
        bulk_load(smem.tile, w.zeros, 64, &smem.mbarrier);
        mbarrier_arrive_expect_tx(&smem.mbarrier, 64);
        wait_for_tile(smem);
    }));
const Register kMbarrierData("mbarrier_as_data", 1, misuse(1, [](const Words& w) {
                                 auto& smem = shared_storage<Smem>();
                                 init_mbarrier(smem);
                                 w.zeros[0] = static_cast<uint32_t>(smem.mbarrier.bits);
                             }));

// ---- rails

enum class Lacking { kNothing, kFlush, kWait };

/// Warp 0 puts and signals, warp 1 reads.
void put_and_signal(const Words& w, int32_t signal_context, Lacking lacking) {
    const Warp warp;
    if (warp.warp_idx() == 0) {
        rail_put({0, 0}, w.poison, w.zeros, 32);
        if (lacking != Lacking::kFlush) rail_flush(0);
        if (warp.thread_idx() < 8) w.zeros[warp.thread_idx()] = 9;
        rail_signal_add({signal_context, 0}, w.wide, 1);
    } else if (warp.is_leader()) {
        while (lacking != Lacking::kWait && ld_acquire_sys(w.wide) == 0) {
            pause_on(w.wide, emu::kNever);
        }
        w.zeros[8] = w.poison[0];
    }
}

/// Warp 0 puts, warp 1 signals as soon as it sees a relaxed word.
void signal_for_another(const Words& w) {
    const Warp warp;
    if (warp.warp_idx() == 0) {
        rail_put({0, 0}, w.poison, w.zeros, 32);
        if (warp.is_leader()) st_relaxed_gpu(w.wide + 1, 1);
        return;
    }
    while (ld_relaxed_gpu(w.wide + 1) == 0) pause_on(w.wide + 1, emu::kNever);
    rail_signal_add({0, 0}, w.wide, 1);
}

const Register kRailOtherWarp("rail_signal_by_another_warp", 1, misuse(64, signal_for_another));
const Register kRailContext("rail_signal_on_another_context", 1, misuse(64, [](const Words& w) {
                                put_and_signal(w, 1, Lacking::kNothing);
                            }));
const Register kRailFlush("rail_source_reused_without_flush", 1, misuse(64, [](const Words& w) {
                              put_and_signal(w, 0, Lacking::kFlush);
                          }));
const Register kRailWait("rail_put_not_awaited", 1,
                         misuse(64, [](const Words& w) { put_and_signal(w, 0, Lacking::kWait); }));

}  // namespace

}  // namespace deepcomm::testing
