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

}  // namespace deepcomm
