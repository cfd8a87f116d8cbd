// SPDX-License-Identifier: Apache-2.0
// Addresses as Python's integers, and structs that kernels take as their argument.
#pragma once

#include <pybind11/gil_simple.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>

#include "bindings/native_function.hpp"
#include "bindings/prepared_launch.hpp"
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
    bound.def(
        "prepare_launch",
        [](const Struct& self, const host::Function& function, int grid,
           pybind11::function current_stream) {
            constexpr auto kThem = pybind11::return_value_policy::reference;
            return prepare_launch({&function, grid, &self, sizeof(Struct),
                                   std::move(current_stream),
                                   pybind11::make_tuple(pybind11::cast(&function, kThem),
                                                        pybind11::cast(&self, kThem))});
        },
        pybind11::arg("function"), pybind11::arg("grid"), pybind11::arg("current_stream"),
        "Return a function that launches, with what is in the struct when it is called, on the "
        "stream whose address current_stream() returns.");
    return bound;
}

}  // namespace deepcomm
