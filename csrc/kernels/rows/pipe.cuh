// SPDX-License-Identifier: Apache-2.0
// Rows through shared memory: a warp loads rows ahead into stages of its own and stores each to
// any number of places. One lane issues loads; every lane may issue stores, and all lanes commit
// and wait for their own groups. PROTOCOLS.md: rows.
#pragma once

#include "device/device.cuh"

namespace deepcomm::kernels {

constexpr int32_t kStageBudgetBytes = 200 << 10;  ///< of the shared memory of an SM
constexpr int32_t kMaxStages = 8;
constexpr uint64_t kDrainNs = 1000000000;

constexpr int32_t clamp(int32_t value, int32_t low, int32_t high) {
    return value < low ? low : value > high ? high : value;
}

/// Shared memory of all warps: kWarps times kStages stages of kBytes.
template <int32_t kWarps, int32_t kStages, int32_t kBytes>
struct StageBank {
    alignas(128) unsigned char bytes[kWarps][kStages][kBytes];
    device::Mbarrier full[kWarps][kStages];
};

/// What is loaded as one row: a second piece may follow the first in its stage.
struct RowPiece {
    const unsigned char* row;
    const unsigned char* scales;  ///< or null
    uint32_t scale_bytes;
};

/// Stages whose stores may still read them. Loads queue behind the stores of their SM, so most stages
/// hold rows that come.
template <int32_t kStages>
constexpr int32_t kUnreadOf = kStages > 4 ? 2 : 1;

/// One warp's stages, used in turn.
template <int32_t kStages, int32_t kBytes, int32_t kLoadBytes, int32_t kScalesAt,
          int32_t kMaxUnread = kUnreadOf<kStages>>
struct RowPipe {
    static constexpr int32_t kLoadsAhead = kStages - kMaxUnread;

    unsigned char (*stages)[kBytes];
    device::Mbarrier* full;
    uint32_t num_loaded = 0;
    uint32_t num_used = 0;

    /// By one lane before the first use; others see it after a barrier.
    DEEPCOMM_DEVICE void init() const {
        for (int32_t stage = 0; stage < kStages; ++stage) device::mbarrier_init(&full[stage], 1);
        device::fence_mbarrier_init();  // ORDER: before the copies that complete on them
    }

    DEEPCOMM_DEVICE bool has_loads() const { return num_loaded != num_used; }
    DEEPCOMM_DEVICE bool may_load() const { return num_loaded - num_used < kLoadsAhead; }
    DEEPCOMM_DEVICE unsigned char* current() const { return stages[num_used % kStages]; }

    DEEPCOMM_DEVICE void load(const RowPiece& piece) {
        load_with([&](unsigned char* stage, device::Mbarrier* barrier) -> uint32_t {
            if (!device::Warp{}.is_leader()) return 0;
            device::bulk_load(stage, piece.row, kLoadBytes, barrier);
            if (piece.scales == nullptr) return kLoadBytes;
            device::bulk_load(stage + kScalesAt, piece.scales, piece.scale_bytes, barrier);
            return kLoadBytes + piece.scale_bytes;
        });
    }

    /// issue(stage, mbarrier) loads what the stage shall hold, by any lanes, and tells the leader how
    /// many bytes that is.
    template <typename Issue>
    DEEPCOMM_DEVICE void load_with(Issue&& issue) {
        const uint32_t stage = num_loaded++ % kStages;
        const uint32_t num_bytes = issue(stages[stage], &full[stage]);
        if (!device::Warp{}.is_leader()) return;
        device::mbarrier_arrive_expect_tx(&full[stage], num_bytes);
    }

    /// Waits for the oldest loaded row.
    DEEPCOMM_DEVICE bool wait(const device::WaitContext& context,
                              const device::WaitSite& site) const {
        const uint32_t parity = num_used / kStages & 1;
        const bool is_there =
            device::wait_mbarrier(context, site, &full[num_used % kStages], parity);
        return device::Warp{}.sync_and(is_there);
    }

    /// After a failure: a block must not end while copies still write its shared memory. Such a
    /// copy needs nobody, so the wait is short, whatever has failed.
    DEEPCOMM_DEVICE void drain() {
        const device::WaitContext alone = {nullptr, kDrainNs, 0};
        while (has_loads()) {
            (void)wait(alone, {});
            ++num_used;
        }
        device::bulk_commit_group();
        device::bulk_wait_group_read<0>();  // ORDER: the stores have read before the block ends
    }

    /// After the stores of the current row were issued: makes room for a load.
    DEEPCOMM_DEVICE void advance() {
        device::bulk_commit_group();
        // ORDER: the older store from the stage that is loaded next has read it
        device::bulk_wait_group_read<kMaxUnread>();
        ++num_used;
        device::Warp{}.sync();  // ORDER: that holds for every lane's stores, and for plain reads
    }
};

/// Loads rows ahead for as long as there are any.
template <typename Pipe, typename Loads>
DEEPCOMM_DEVICE bool load_ahead(Pipe& pipe, Loads& loads) {
    while (pipe.may_load()) {
        RowPiece piece{};
        if (!loads.next(&piece)) return loads.is_alive();
        pipe.load(piece);
    }
    return true;
}

/// Moves rows: loads.next(&piece) names the next row to load, body() waits for the oldest and issues
/// its stores. False when a wait has run out; nothing is in flight then.
template <typename Pipe, typename Loads, typename Body>
DEEPCOMM_DEVICE bool move_rows(Pipe& pipe, Loads& loads, Body&& body) {
    bool is_complete = load_ahead(pipe, loads);
    while (is_complete && pipe.has_loads()) {
        is_complete = body();
        if (!is_complete) break;
        pipe.advance();
        is_complete = load_ahead(pipe, loads);
    }
    if (!is_complete) pipe.drain();
    return is_complete;
}

}  // namespace deepcomm::kernels
