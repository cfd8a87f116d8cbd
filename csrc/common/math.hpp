// SPDX-License-Identifier: Apache-2.0
// Integer arithmetic shared by every layer.
#pragma once

#include "common/int.hpp"

namespace deepcomm {

constexpr int64_t ceil_div(int64_t value, int64_t divisor) {
    return (value + divisor - 1) / divisor;
}

constexpr int64_t round_up(int64_t value, int64_t multiple) {
    return ceil_div(value, multiple) * multiple;
}

/// A number from 1 on that a device divides by, without its division of 30 instructions. Like an integer,
/// but for `/` and `%` of values n >= 0 with n * number <= 2^31, which multiply by the inverse.
struct Divisor {
    int32_t number;
    /// 2^31 / number, rounded up: n times it is too large by less than 1 / number.
    uint32_t inverse;

    static constexpr Divisor of(int32_t number) {
        return {number, static_cast<uint32_t>(ceil_div(int64_t{1} << 31, number))};
    }
    constexpr operator int32_t() const { return number; }
};

constexpr int32_t operator/(int32_t value, const Divisor& by) {
    return static_cast<int32_t>(
        (static_cast<uint64_t>(2 * static_cast<uint32_t>(value)) * by.inverse) >> 32);
}
constexpr int32_t operator%(int32_t value, const Divisor& by) {
    return value - value / by * by.number;
}
static_assert(23 / Divisor::of(1) == 23 && 23 % Divisor::of(8) == 7 && 24 / Divisor::of(8) == 3,
              "");
static_assert((1 << 21) / Divisor::of(1 << 10) == 1 << 11 && 2097150 / Divisor::of(1023) == 2050,
              "");

}  // namespace deepcomm
