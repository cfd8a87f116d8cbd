// SPDX-License-Identifier: Apache-2.0
// What the bindings of the CPU backend share: waits without the GIL.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>

#include "bindings/address.hpp"
#include "cpu/endpoint.hpp"

namespace deepcomm {

/// Runs a method of an operation under its endpoint's guard, without the GIL.
template <typename Op, typename Result, typename... Args>
auto guarded(Result (Op::*method)(Args...)) {
    return [method](Op& op, cpu::Endpoint& endpoint, Args... args) {
        const pybind11::gil_scoped_release release;
        return endpoint.guarded([&] { return (op.*method)(std::forward<Args>(args)...); });
    };
}

/// Structs that Python fills, and those it reads.
void bind_cpu_args(pybind11::module_& module);
/// The operations of both modes.
void bind_cpu_operations(pybind11::module_& module);

}  // namespace deepcomm
