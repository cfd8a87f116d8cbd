// SPDX-License-Identifier: Apache-2.0
// What waits without the GIL calls now and then, so that Ctrl-C ends it.
#pragma once

#include <pybind11/pybind11.h>

namespace deepcomm {

/// Runs Python's signal handlers; throws what they raise.
inline void check_signals() {
    const pybind11::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) {
        throw pybind11::error_already_set();
    }
}

}  // namespace deepcomm
