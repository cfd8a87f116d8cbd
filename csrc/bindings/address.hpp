// SPDX-License-Identifier: Apache-2.0
// Addresses as Python's integers, and structs that kernels take as their argument.
#pragma once

#include <pybind11/gil_simple.h>
#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings/native_function.hpp"
#include "host/function.hpp"

namespace deepcomm {

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

/// Writable property of a struct that holds an address.
template <typename Class, typename Struct, typename T>
void def_address(Class& bound, const char* name, T* Struct::* member) {
    bound.def_property(
        name, [member](const Struct& self) { return reinterpret_cast<uintptr_t>(self.*member); },
        [member](Struct& self, uintptr_t value) { self.*member = pointer<T>(value); });
}

/// Launches a kernel that takes such a struct. The driver may wait, for kernels of other threads' ranks.
template <typename Struct>
void launch_with(const Struct& params, const host::Function& function, int grid, uintptr_t stream) {
    const pybind11::gil_scoped_release_simple release;
    function.launch(grid, &params, static_cast<int64_t>(sizeof(Struct)),
                    pointer<host::cu::StreamObject>(stream));
}

/// A zeroed struct that a kernel takes by value; it is launched by one call, as short as can be.
template <typename Struct>
pybind11::class_<Struct> kernel_params(pybind11::module_& module, const char* name) {
    pybind11::class_<Struct> bound(module, name);
    bound.def(pybind11::init([] { return Struct{}; }))
        .def_property_readonly(
            "address", [](const Struct& self) { return reinterpret_cast<uintptr_t>(&self); })
        .def_property_readonly("num_bytes", [](const Struct& /*self*/) { return sizeof(Struct); });
    def_method<&launch_with<Struct>>(
        bound, "launch",
        "launch(self, function: deepcomm._C.cuda.Function, grid: int, stream: int, /) -> None");
    return bound;
}

}  // namespace deepcomm
