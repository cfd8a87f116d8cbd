// SPDX-License-Identifier: Apache-2.0
// What the host reads of memory that kernels write meanwhile.
#pragma once

#include <cstdint>

#include "layout/error_record.hpp"

namespace deepcomm::host {

template <typename T>
T load_acquire(const T* word) {
    // ORDER: pairs with the system-scope releases of the kernels, after what they wrote
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

/// Whether the fields of a record with this state may be read.
inline bool is_complete(const uint32_t* state) {
    return load_acquire(state) == static_cast<uint32_t>(layout::RecordState::kComplete);
}

}  // namespace deepcomm::host
