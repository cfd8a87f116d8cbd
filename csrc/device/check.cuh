// SPDX-License-Identifier: Apache-2.0
// Run-time bounds on the device: always on, for cold paths.
#pragma once

#include "device/wait.cuh"

/// Fills the error record with expected and observed and ends the thread unless condition holds.
#define DEEPCOMM_DEVICE_CHECK(context, site, condition, expected, observed)        \
    do {                                                                           \
        if (!(condition)) {                                                        \
            ::deepcomm::device::record_failure(                                    \
                (context), (site), ::deepcomm::layout::FailureKind::kCheck,        \
                static_cast<uint64_t>(expected), static_cast<uint64_t>(observed)); \
            ::deepcomm::device::exit_thread();                                     \
        }                                                                          \
    } while (false)
