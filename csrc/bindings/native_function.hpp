// SPDX-License-Identifier: Apache-2.0
// Functions that Python calls itself, for those that take less time than pybind11 takes to call them.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <utility>

namespace deepcomm {

/// Returns what make_function was given, to a function that Python has called.
template <typename State>
const State& state_of(PyObject* self) {
    return *static_cast<const State*>(PyCapsule_GetPointer(self, nullptr));
}

/// Returns a function whose first argument is its state. The definition has to last.
template <typename State>
pybind11::function make_function(PyMethodDef& definition, State state) {
    auto owner = std::make_unique<State>(std::move(state));
    const pybind11::capsule self(owner.get(), [](void* kept) { delete static_cast<State*>(kept); });
    owner.release();
    PyObject* const function = PyCFunction_New(&definition, self.ptr());
    if (function == nullptr) {
        throw pybind11::error_already_set();
    }
    return pybind11::reinterpret_steal<pybind11::function>(function);
}

}  // namespace deepcomm
