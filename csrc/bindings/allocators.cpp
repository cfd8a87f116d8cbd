// SPDX-License-Identifier: Apache-2.0
// deepcomm._C.kernels: what allocates tensors alike, by torch's functions.
#include <pybind11/pybind11.h>

#include <utility>

#include "bindings/bind.hpp"
#include "bindings/native_function.hpp"

namespace py = pybind11;

namespace deepcomm {
namespace {

/// A function of torch that knows only the current device, and another for where that is not meant.
struct Allocation {
    py::function here;
    py::tuple arguments;
    py::object current_device;
    long index;
    py::function anywhere;

    /// Returns 1 or 0; -1 with Python's error set.
    int is_here() const {
        const auto current =
            py::reinterpret_steal<py::object>(PyObject_CallNoArgs(current_device.ptr()));
        const long found = current ? PyLong_AsLong(current.ptr()) : -1;
        return found == -1 && PyErr_Occurred() != nullptr ? -1 : static_cast<int>(found == index);
    }
};

PyObject* allocate(PyObject* self, PyObject* /*none*/) {
    const auto& allocation = state_of<Allocation>(self);
    switch (allocation.current_device.is_none() ? 1 : allocation.is_here()) {
        case 1: return PyObject_Call(allocation.here.ptr(), allocation.arguments.ptr(), nullptr);
        case 0: return PyObject_CallNoArgs(allocation.anywhere.ptr());
        default: return nullptr;
    }
}

PyMethodDef allocator_definition{"allocate", &allocate, METH_NOARGS, "Return a new tensor."};

}  // namespace

void bind_allocators(py::module_& parent) {
    auto module = parent.attr("kernels").cast<py::module_>();
    module.def(
        "allocator",
        [](py::function here, py::tuple arguments, py::object current_device, long index,
           py::function anywhere) {
            return make_function(allocator_definition,
                                 Allocation{std::move(here), std::move(arguments),
                                            std::move(current_device), index, std::move(anywhere)});
        },
        py::arg("here"), py::arg("arguments"), py::arg("current_device"), py::arg("index"),
        py::arg("anywhere"),
        "Return a function that calls here(*arguments) where current_device is None or returns the "
        "index, and else anywhere().");
}

}  // namespace deepcomm
