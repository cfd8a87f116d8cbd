// SPDX-License-Identifier: Apache-2.0
// A launch of which all is known but the stream, as a function of Python's.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "host/function.hpp"

namespace deepcomm {

struct PreparedLaunch {
    const host::Function* function;
    int grid;
    const void* params;
    int64_t num_bytes;
    pybind11::object current_stream;  ///< returns the stream's address
    pybind11::tuple owners;           ///< of the function and the params
};

/// Returns a function without arguments that launches on the current stream, with what is in the params
/// when it is called.
pybind11::function prepare_launch(PreparedLaunch launch);

}  // namespace deepcomm
