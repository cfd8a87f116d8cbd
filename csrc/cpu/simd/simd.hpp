// SPDX-License-Identifier: Apache-2.0
// Row arithmetic of the CPU backend: copies, the FP8 cast and the FP32 reduction. One table of
// functions per instruction set, all bitwise equal (facts of the arithmetic: deepcomm/reference.py).
// Callers own threading and ordering.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "common/types.hpp"

namespace deepcomm::cpu {

enum class Isa : int32_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

/// One row of a reduction: dst = round(sum over groups of (sum over rows of a group) + bias).
/// Every sum is FP32 and starts at +0; multiplication and addition are separate (never fused).
struct ReduceArgs {
    void* dst;    ///< num_elements of dtype
    DType dtype;  ///< bf16, f16 or f32: of dst, rows and bias
    int64_t num_elements;
    const void* const* rows;     ///< all rows, group after group
    const float* weights;        ///< one a row, multiplied first; or null
    const int32_t* group_sizes;  ///< rows of each group
    int32_t num_groups;          ///< 0 gives zeros (plus bias)
    const void* bias;            ///< one row added last; or null
    bool stream;                 ///< write dst past the caches (then call stream_fence)
};

/// Further places of a row that is being cast, at multiples of 64 bytes. They are written past the
/// caches while the cast computes, which hides most of it (then call stream_fence).
struct CastCopies {
    std::byte* const* rows = nullptr;
    int32_t count = 0;
};

struct RowOps {
    /// Copies through the caches.
    void (*copy)(void* dst, const void* src, int64_t num_bytes);
    /// Copies with non-temporal stores; order them with stream_fence before publishing.
    void (*copy_stream)(void* dst, const void* src, int64_t num_bytes);
    /// Casts one row to FP8 E4M3 with one FP32 scale per 128 elements (the last tile may be short).
    void (*cast_fp8)(uint8_t* dst, float* scales, const void* src, DType dtype,
                     int64_t num_elements, const CastCopies& copies);
    /// The same with UE8M0 scales, one exponent byte a tile.
    void (*cast_fp8_ue8m0)(uint8_t* dst, uint8_t* scales, const void* src, DType dtype,
                           int64_t num_elements, const CastCopies& copies);
    void (*reduce)(const ReduceArgs& args);
};

/// Orders earlier non-temporal stores of this thread before its later stores.
void stream_fence();

/// The best instruction set of this machine that is compiled in.
Isa best_isa();
/// Whether this machine can run isa.
bool isa_supported(Isa isa);
const RowOps& row_ops(Isa isa);
std::string isa_name(Isa isa);

}  // namespace deepcomm::cpu
