// SPDX-License-Identifier: Apache-2.0
// Element types and small enumerations shared by every layer. Host and device; no torch.
#pragma once

#include "common/int.hpp"

namespace deepcomm {

/// Element type of a row as it travels.
enum class DType : int32_t { kBf16 = 0, kF16 = 1, kF32 = 2, kFp8E4m3 = 3 };

/// Format of the FP8 scales: one FP32 a tile, or one UE8M0 exponent byte a tile.
enum class ScaleFormat : int32_t { kNone = 0, kFp32 = 1, kUe8m0 = 2 };

/// Order of the received rows; mirrors deepcomm.types.RecvLayout.
enum class RecvLayout : int32_t { kToken = 0, kExpert = 1, kExpertPadded = 2 };

constexpr int32_t kScaleTile = 128;  ///< channels that share one scale
constexpr int32_t kMaxTopk = 32;

constexpr int64_t dtype_bytes(DType dtype) {
    return dtype == DType::kF32 ? 4 : dtype == DType::kFp8E4m3 ? 1 : 2;
}

}  // namespace deepcomm
