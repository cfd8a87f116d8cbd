// SPDX-License-Identifier: Apache-2.0
// The catalogue of shapes: small programs whose outcomes the PTX memory model allows or forbids.
// A forbidden outcome or a race report on a correct shape is a failure of the emulator; whether the
// allowed weak outcomes do occur is counted.
#include "device/device.cuh"
#include "emu/cluster.hpp"
#include "harness.hpp"

namespace deepcomm::testing {

namespace {

using emu::Cluster;
using emu::Fill;
using namespace device;  // NOLINT: the shapes are lists of primitives

/// Locations of a shape: three strong words, each on a rank of its own, and results of up to four
/// threads. One thread a rank; x and y live on different ranks than some of their readers.
struct Shape {
    uint32_t* x;
    uint32_t* y;
    uint32_t* z;
    uint32_t* r;  ///< [8]: results, written by one thread each
};

using Body = std::function<void(const Shape&, int)>;     ///< what thread (rank) i does
using Outcome = std::function<bool(const uint32_t* r)>;  ///< whether the weak outcome occurred

CaseBody shape(bool is_allowed, const Body& body, const Outcome& outcome) {
    return [=](Cluster& cluster) -> std::string {
        Shape words{};
        words.x = cluster.alloc<uint32_t>(0, "x", 1, Fill::kZero);
        words.y = cluster.alloc<uint32_t>(1 % cluster.num_ranks(), "y", 1, Fill::kZero);
        words.z = cluster.alloc<uint32_t>(2 % cluster.num_ranks(), "z", 1, Fill::kZero);
        words.r = cluster.alloc<uint32_t>(0, "results", 8, Fill::kZero);
        for (int rank = 0; rank < cluster.num_ranks(); ++rank) {
            cluster.launch(rank, {1, 1, 0, [&, rank] { body(words, rank); }});
        }
        const std::string error = cluster.run();
        if (!error.empty()) return error;
        if (!outcome(words.r)) return "";
        note("weak outcome");
        return is_allowed ? "" : "forbidden outcome";
    };
}

/// The same with the threads as blocks of rank 0, for narrower scopes.
CaseBody shape_of_blocks(bool is_allowed, const Body& body, const Outcome& outcome) {
    return [=](Cluster& cluster) -> std::string {
        auto* words = cluster.alloc<uint32_t>(0, "words", 3, Fill::kZero);
        auto* results = cluster.alloc<uint32_t>(0, "results", 8, Fill::kZero);
        const Shape all = {words, words + 1, words + 2, results};
        const auto kernel = [&] { body(all, static_cast<int>(blockIdx.x)); };
        cluster.launch(0, {2, 1, 0, kernel});
        const std::string error = cluster.run();
        if (!error.empty()) return error;
        if (!outcome(results)) return "";
        note("weak outcome");
        return is_allowed ? "" : "forbidden outcome";
    };
}

constexpr bool kAllowed = true, kForbidden = false;

bool is_stale(const uint32_t* r) { return r[0] == 1 && r[1] == 0; }

// clang-format off: a shape is a paragraph; nested lambdas would be spread over the page

// ---- message passing

const Register kMpRelease("mp_release_acquire", 2, shape(kForbidden, [](const Shape& s, int rank) {
    if (rank == 0) {
        st_relaxed_sys(s.x, 1u);
        st_release_sys(s.y, 1u);
    } else {
        s.r[0] = ld_acquire_sys(s.y);
        s.r[1] = ld_relaxed_sys(s.x);
    }
}, is_stale));

const Register kMpFences("mp_fences", 2, shape(kForbidden, [](const Shape& s, int rank) {
    if (rank == 0) {
        st_relaxed_sys(s.x, 1u);
        fence_acq_rel_sys();
        st_relaxed_sys(s.y, 1u);
    } else {
        s.r[0] = ld_relaxed_sys(s.y);
        fence_acq_rel_sys();
        s.r[1] = ld_relaxed_sys(s.x);
    }
}, is_stale));

const Register kMpRelaxed("mp_relaxed", 2, shape(kAllowed, [](const Shape& s, int rank) {
    if (rank == 0) {
        st_relaxed_sys(s.x, 1u);
        st_relaxed_sys(s.y, 1u);
    } else {
        s.r[0] = ld_relaxed_sys(s.y);
        s.r[1] = ld_relaxed_sys(s.x);
    }
}, is_stale));

const Register kMpNarrowFence("mp_fence_too_narrow", 2,
    shape(kAllowed, [](const Shape& s, int rank) {
    if (rank == 0) {
        st_relaxed_sys(s.x, 1u);
        fence_acq_rel_gpu();  // does not reach the other rank
        st_relaxed_sys(s.y, 1u);
    } else {
        s.r[0] = ld_acquire_sys(s.y);
        s.r[1] = ld_relaxed_sys(s.x);
    }
}, is_stale));

void send_by_fence(const Shape& s, void (*fence)()) {
    st_relaxed_gpu(s.x, 1u);
    fence();
    st_relaxed_gpu(s.y, 1u);
}

void receive_by_fence(const Shape& s) {
    s.r[0] = ld_relaxed_gpu(s.y);
    fence_acq_rel_gpu();
    s.r[1] = ld_relaxed_gpu(s.x);
}

const Register kMpGpu("mp_gpu_release_acquire", 1,
    shape_of_blocks(kForbidden, [](const Shape& s, int block) {
    if (block == 0) {
        st_relaxed_gpu(s.x, 1u);
        st_release_gpu(s.y, 1u);
    } else {
        s.r[0] = ld_acquire_gpu(s.y);
        s.r[1] = ld_relaxed_gpu(s.x);
    }
}, is_stale));

const Register kMpGpuFence("mp_gpu_fences", 1,
    shape_of_blocks(kForbidden, [](const Shape& s, int block) {
    if (block == 0) send_by_fence(s, fence_acq_rel_gpu);
    if (block == 1) receive_by_fence(s);
}, is_stale));

const Register kMpBlockFence("mp_block_fence_across_blocks", 1,
    shape_of_blocks(kAllowed, [](const Shape& s, int block) {
    if (block == 0) send_by_fence(s, fence_acq_rel_block);
    if (block == 1) receive_by_fence(s);
}, is_stale));

// A gpu-scope release reaches another rank through a third thread's sys-scope one.
const Register kCumulative("isa2_gpu_then_sys", 2, [](Cluster& cluster) -> std::string {
    auto* x = cluster.alloc<uint32_t>(1, "x", 1, Fill::kZero);
    auto* y = cluster.alloc<uint32_t>(0, "y", 1, Fill::kZero);
    auto* z = cluster.alloc<uint32_t>(1, "z", 1, Fill::kZero);
    auto* r = cluster.alloc<uint32_t>(1, "results", 2, Fill::kZero);
    cluster.launch(0, {2, 1, 0, [=] {
        if (blockIdx.x == 0) {
            st_relaxed_sys(x, 1u);
            st_release_gpu(y, 1u);
        } else {
            const uint32_t seen = ld_acquire_gpu(y);
            st_release_sys(z, seen + 1);
        }
    }});
    cluster.launch(1, {1, 1, 0, [=] {
        r[0] = ld_acquire_sys(z);
        r[1] = ld_relaxed_sys(x);
    }});
    const std::string error = cluster.run();
    if (!error.empty()) return error;
    return r[0] == 2 && r[1] == 0 ? "forbidden outcome" : "";
});

// ---- release sequences

const Register kRmwChain("release_sequence_rmw", 3, shape(kForbidden, [](const Shape& s, int rank) {
    if (rank == 0) {
        st_relaxed_sys(s.x, 1u);
        red_add_release_sys(s.y, 1u);
    } else if (rank == 1) {
        red_add_relaxed_sys(s.y, 2u);
    } else {
        s.r[0] = ld_acquire_sys(s.y);
        s.r[1] = ld_relaxed_sys(s.x);
    }
}, [](const uint32_t* r) { return (r[0] & 1) && r[1] == 0; }));

const Register kOwnRmw("release_sequence_own_rmw", 2,
    shape(kForbidden, [](const Shape& s, int rank) {
    if (rank == 0) {
        st_relaxed_sys(s.x, 1u);
        red_add_release_sys(s.y, 1u);
    } else {
        red_add_relaxed_sys(s.y, 2u);
        s.r[0] = ld_acquire_sys(s.y);  // may read its own addition, which continues the release
        s.r[1] = ld_relaxed_sys(s.x);
    }
}, [](const uint32_t* r) { return r[0] == 3 && r[1] == 0; }));

const Register kBrokenChain("release_sequence_broken_by_store", 2,
    shape(kAllowed, [](const Shape& s, int rank) {
    if (rank == 0) {
        st_relaxed_sys(s.x, 1u);
        st_release_sys(s.y, 1u);
        st_relaxed_sys(s.y, 2u);  // heads no release
    } else {
        s.r[0] = ld_acquire_sys(s.y);
        s.r[1] = ld_relaxed_sys(s.x);
    }
}, [](const uint32_t* r) { return r[0] == 2 && r[1] == 0; }));

// ---- store buffering

const Register kSbRelaxed("sb_relaxed", 2, shape(kAllowed, [](const Shape& s, int rank) {
    st_relaxed_sys(rank == 0 ? s.x : s.y, 1u);
    s.r[rank] = ld_relaxed_sys(rank == 0 ? s.y : s.x) + 1;
}, [](const uint32_t* r) { return r[0] == 1 && r[1] == 1; }));

const Register kSbAcqRel("sb_fence_acq_rel", 2, shape(kAllowed, [](const Shape& s, int rank) {
    st_relaxed_sys(rank == 0 ? s.x : s.y, 1u);
    fence_acq_rel_sys();
    s.r[rank] = ld_relaxed_sys(rank == 0 ? s.y : s.x) + 1;
}, [](const uint32_t* r) { return r[0] == 1 && r[1] == 1; }));

const Register kSbSc("sb_fence_sc", 2, shape(kForbidden, [](const Shape& s, int rank) {
    st_relaxed_sys(rank == 0 ? s.x : s.y, 1u);
    fence_sc_sys();
    s.r[rank] = ld_relaxed_sys(rank == 0 ? s.y : s.x) + 1;
}, [](const uint32_t* r) { return r[0] == 1 && r[1] == 1; }));

const Register kSbScGpu("sb_fence_sc_gpu_across_ranks", 2,
    shape(kAllowed, [](const Shape& s, int rank) {
    st_relaxed_sys(rank == 0 ? s.x : s.y, 1u);
    fence_sc_gpu();
    s.r[rank] = ld_relaxed_sys(rank == 0 ? s.y : s.x) + 1;
}, [](const uint32_t* r) { return r[0] == 1 && r[1] == 1; }));

// ---- causality through a third thread

const Register kWrc("wrc", 3, shape(kForbidden, [](const Shape& s, int rank) {
    if (rank == 0) {
        st_relaxed_sys(s.x, 1u);
    } else if (rank == 1) {
        s.r[0] = ld_relaxed_sys(s.x);
        st_release_sys(s.y, 1u);
    } else {
        s.r[1] = ld_acquire_sys(s.y);
        s.r[2] = ld_relaxed_sys(s.x);
    }
}, [](const uint32_t* r) { return r[0] == 1 && r[1] == 1 && r[2] == 0; }));

const Register kIsa2("isa2", 3, shape(kForbidden, [](const Shape& s, int rank) {
    if (rank == 0) {
        st_relaxed_sys(s.x, 1u);
        st_release_sys(s.y, 1u);
    } else if (rank == 1) {
        s.r[0] = ld_acquire_sys(s.y);
        st_release_sys(s.z, 1u);
    } else {
        s.r[1] = ld_acquire_sys(s.z);
        s.r[2] = ld_relaxed_sys(s.x);
    }
}, [](const uint32_t* r) { return r[0] == 1 && r[1] == 1 && r[2] == 0; }));

const Register kIsa2Relaxed("isa2_relaxed_middle", 3, shape(kAllowed, [](const Shape& s, int rank) {
    if (rank == 0) {
        st_relaxed_sys(s.x, 1u);
        st_release_sys(s.y, 1u);
    } else if (rank == 1) {
        s.r[0] = ld_relaxed_sys(s.y);
        st_release_sys(s.z, 1u);
    } else {
        s.r[1] = ld_acquire_sys(s.z);
        s.r[2] = ld_relaxed_sys(s.x);
    }
}, [](const uint32_t* r) { return r[0] == 1 && r[1] == 1 && r[2] == 0; }));

CaseBody iriw(bool is_allowed, void (*between)()) {
    return shape(is_allowed, [between](const Shape& s, int rank) {
        if (rank < 2) {
            st_relaxed_sys(rank == 0 ? s.x : s.y, 1u);
            return;
        }
        uint32_t* results = s.r + 2 * (rank - 2);
        results[0] = ld_acquire_sys(rank == 2 ? s.x : s.y);
        if (between) between();
        results[1] = ld_acquire_sys(rank == 2 ? s.y : s.x);
    }, [](const uint32_t* r) { return r[0] == 1 && r[1] == 0 && r[2] == 1 && r[3] == 0; });
}

const Register kIriw("iriw_acquire", 4, iriw(kAllowed, nullptr));
const Register kIriwAcqRel("iriw_fence_acq_rel", 4, iriw(kAllowed, fence_acq_rel_sys));
const Register kIriwSc("iriw_fence_sc", 4, iriw(kForbidden, fence_sc_sys));

// ---- coherence

const Register kCoRr("coherence_read_read", 2, shape(kForbidden, [](const Shape& s, int rank) {
    if (rank == 0) {
        st_relaxed_sys(s.x, 1u);
        st_relaxed_sys(s.x, 2u);
    } else {
        s.r[0] = ld_relaxed_sys(s.x);
        s.r[1] = ld_relaxed_sys(s.x);
    }
}, [](const uint32_t* r) { return r[0] > r[1]; }));

const Register kCoWr("coherence_write_read", 2, shape(kForbidden, [](const Shape& s, int rank) {
    if (rank == 0) {
        st_relaxed_sys(s.x, 1u);
        s.r[0] = ld_relaxed_sys(s.x);
    } else {
        st_relaxed_sys(s.x, 2u);
    }
}, [](const uint32_t* r) { return r[0] == 0; }));

const Register kAtomicity("rmw_atomicity", 4, shape(kForbidden, [](const Shape& s, int rank) {
    s.r[rank] = atom_add_relaxed_sys(s.x, 1u) + 1;
}, [](const uint32_t* r) { return r[0] + r[1] + r[2] + r[3] != 1 + 2 + 3 + 4; }));

// ---- known to be incomplete: PTX allows these, the emulator never produces them

const Register kLb("lb_relaxed", 2, shape(kAllowed, [](const Shape& s, int rank) {
    s.r[rank] = ld_relaxed_sys(rank == 0 ? s.x : s.y);
    st_relaxed_sys(rank == 0 ? s.y : s.x, 1u);
}, [](const uint32_t* r) { return r[0] == 1 && r[1] == 1; }));

const Register kTwoPlusTwoW("2+2w_relaxed", 3, shape(kAllowed, [](const Shape& s, int rank) {
    if (rank == 2) return;
    st_relaxed_sys(rank == 0 ? s.x : s.y, 1u);
    st_relaxed_sys(rank == 0 ? s.y : s.x, 2u);
    s.r[rank] = ld_relaxed_sys(rank == 0 ? s.y : s.x);
    red_add_release_sys(s.z, 1u);
    if (rank == 1) return;
    while (ld_acquire_sys(s.z) != 2) pause_on(s.z, ~uint64_t{0});
    s.r[2] = ld_relaxed_sys(s.x) + 4 * ld_relaxed_sys(s.y);
}, [](const uint32_t* r) { return r[2] == 1 + 4 * 1; }));

// clang-format on

}  // namespace

}  // namespace deepcomm::testing
