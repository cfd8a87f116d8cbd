// SPDX-License-Identifier: Apache-2.0
// What the bindings of the CPU backend share: addresses, and waits without the GIL.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>

#include "cpu/endpoint.hpp"

namespace deepcomm {

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

/// Runs a method of an operation under its endpoint's guard, without the GIL.
template <typename Op, typename Result, typename... Args>
auto guarded(Result (Op::*method)(Args...)) {
    return [method](Op& op, cpu::Endpoint& endpoint, Args... args) {
        const pybind11::gil_scoped_release release;
        return endpoint.guarded([&] { return (op.*method)(std::forward<Args>(args)...); });
    };
}

/// Writable property of a struct that holds an address.
template <typename Class, typename Struct, typename T>
void def_address(Class& bound, const char* name, T* Struct::* member) {
    bound.def_property(
        name, [member](const Struct& self) { return reinterpret_cast<uintptr_t>(self.*member); },
        [member](Struct& self, uintptr_t value) { self.*member = pointer<T>(value); });
}

/// Structs that Python fills, and those it reads.
void bind_cpu_args(pybind11::module_& module);
/// The operations of both modes.
void bind_cpu_operations(pybind11::module_& module);

}  // namespace deepcomm
