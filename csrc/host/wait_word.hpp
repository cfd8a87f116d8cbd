// SPDX-License-Identifier: Apache-2.0
// The bounded wait of the host for a kernel: for a word of memory that both see.
#pragma once

#include <cstdint>
#include <functional>

#include "layout/error_record.hpp"

namespace deepcomm::host {

/// Polls until *word equals expected, and acquires what was written before it. Returns false once
/// timeout_s has passed or the record is complete. check_interrupt is called now and then; it may
/// throw.
bool wait_word(const uint64_t* word, uint64_t expected, const layout::ErrorRecord* record,
               double timeout_s, const std::function<void()>& check_interrupt);

}  // namespace deepcomm::host
