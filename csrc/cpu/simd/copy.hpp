// SPDX-License-Identifier: Apache-2.0
// Row copies for any instruction set V (see the note in vector.hpp on including this).
#pragma once

#include "cpu/simd/vector.hpp"

namespace deepcomm::cpu {
namespace {

inline void copy(void* dst, const void* src, int64_t num_bytes) {
    std::memcpy(dst, src, static_cast<size_t>(num_bytes));
}

/// Whole cache lines go past the caches; the bytes before and after them are stored ordinarily.
template <class V>
void copy_stream(void* dst, const void* src, int64_t num_bytes) {
    constexpr int64_t kLine = 64;
    constexpr int64_t kStep = 4 * kLine;
    auto* to = static_cast<char*>(dst);
    const auto* from = static_cast<const char*>(src);
    const auto misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(dst) % kLine);
    const int64_t head = misaligned == 0 ? 0 : kLine - misaligned;
    if (num_bytes < head + kLine) return copy(dst, src, num_bytes);
    copy(to, from, head);
    int64_t offset = head;
    for (; offset + kStep <= num_bytes; offset += kStep) {
        typename V::U32 x[kStep / V::kVectorBytes];
        for (int64_t line = 0; line < kStep; line += kLine) {
            __builtin_prefetch(from + offset + line + kPrefetchBytes);
        }
        std::memcpy(x, from + offset, kStep);
        for (int64_t i = 0; i < kStep / V::kVectorBytes; ++i) {
            V::stream(to + offset + i * V::kVectorBytes, x[i]);
        }
    }
    for (; offset + V::kVectorBytes <= num_bytes; offset += V::kVectorBytes) {
        V::stream(to + offset, load<typename V::U32>(from + offset));
    }
    copy(to + offset, from + offset, num_bytes - offset);
}

}  // namespace
}  // namespace deepcomm::cpu
