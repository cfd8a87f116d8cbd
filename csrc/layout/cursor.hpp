// SPDX-License-Identifier: Apache-2.0
// The one way to place things in memory: a cursor that hands out aligned byte offsets.
// Host and device; every other file of layout/ is written with it.
#pragma once

#include "common/int.hpp"
#include "common/math.hpp"

namespace deepcomm::layout {

/// Hands out consecutive, aligned byte ranges. Copyable, so that a layout can be computed twice.
class Cursor {
  public:
    constexpr explicit Cursor(int64_t begin = 0) : offset_(begin) {}

    /// Returns the offset of num_bytes bytes aligned to alignment, and moves past them.
    constexpr int64_t take(int64_t num_bytes, int64_t alignment) {
        const int64_t begin = round_up(offset_, alignment);
        offset_ = begin + num_bytes;
        return begin;
    }

    template <typename T>
    constexpr int64_t take_array(int64_t count, int64_t alignment = alignof(T)) {
        return take(count * static_cast<int64_t>(sizeof(T)), alignment);
    }

    /// Bytes handed out so far, rounded up to alignment.
    constexpr int64_t end(int64_t alignment = 1) const { return round_up(offset_, alignment); }

  private:
    int64_t offset_;
};

}  // namespace deepcomm::layout
