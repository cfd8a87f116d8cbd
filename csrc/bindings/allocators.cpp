// SPDX-License-Identifier: Apache-2.0
// deepcomm._C.kernels: what allocates tensors alike, by torch's functions.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <utility>
#include <vector>

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
        if (current_device.is_none()) {
            return 1;
        }
        const auto current =
            py::reinterpret_steal<py::object>(PyObject_CallNoArgs(current_device.ptr()));
        const long found = current ? PyLong_AsLong(current.ptr()) : -1;
        return found == -1 && PyErr_Occurred() != nullptr ? -1 : static_cast<int>(found == index);
    }
};

PyObject* allocate_as(const Allocation& allocation, int is_here) {
    switch (is_here) {
        case 1: return PyObject_Call(allocation.here.ptr(), allocation.arguments.ptr(), nullptr);
        case 0: return PyObject_CallNoArgs(allocation.anywhere.ptr());
        default: return nullptr;
    }
}

PyObject* allocate(PyObject* self, PyObject* /*none*/) {
    const auto& allocation = state_of<Allocation>(self);
    return allocate_as(allocation, allocation.is_here());
}

PyMethodDef allocator_definition{"allocate", &allocate, METH_NOARGS, "Return a new tensor."};

/// Returns what such a function has, null for another's.
const Allocation* allocation_of(py::handle function) {
    const bool is_ours = PyCFunction_Check(function.ptr()) != 0 &&
                         PyCFunction_GetFunction(function.ptr()) == &allocate;
    return is_ours ? &state_of<Allocation>(PyCFunction_GetSelf(function.ptr())) : nullptr;
}

/// One of several tensors: by an allocation, by a function of Python's, or None.
struct Member {
    py::object function;
    const Allocation* allocation;  ///< of the function

    explicit Member(py::object given)
        : function(std::move(given)), allocation(allocation_of(function)) {}

    PyObject* make(int is_here) const {
        if (function.is_none()) {
            return Py_NewRef(Py_None);
        }
        return allocation == nullptr ? PyObject_CallNoArgs(function.ptr())
                                     : allocate_as(*allocation, is_here);
    }
};

/// Allocations of one device.
struct Together {
    std::vector<Member> members;
    const Allocation* asked = nullptr;  ///< where the current device is asked for

    explicit Together(const std::vector<py::object>& functions) {
        for (const py::object& function : functions) {
            const Member& member = members.emplace_back(function);
            asked = asked == nullptr ? member.allocation : asked;
            if (member.allocation != nullptr && member.allocation->index != asked->index) {
                throw py::value_error("functions: expected those of one device");
            }
        }
    }
};

PyObject* allocate_all(PyObject* self, PyObject* /*none*/) {
    const auto& together = state_of<Together>(self);
    const int is_here = together.asked == nullptr ? 0 : together.asked->is_here();
    auto made = py::reinterpret_steal<py::object>(
        PyTuple_New(static_cast<Py_ssize_t>(together.members.size())));
    if (!made || is_here < 0) {
        return nullptr;
    }
    Py_ssize_t index = 0;
    for (const Member& member : together.members) {
        PyObject* const tensor = member.make(is_here);
        if (tensor == nullptr) {
            return nullptr;
        }
        PyTuple_SET_ITEM(made.ptr(), index++, tensor);
    }
    return made.release().ptr();
}

PyMethodDef together_definition{"allocate_all", &allocate_all, METH_NOARGS,
                                "Return a tuple of new tensors."};

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
    module.def(
        "allocator_of_all",
        [](const std::vector<py::object>& functions) {
            return make_function(together_definition, Together(functions));
        },
        py::arg("functions"),
        "Return a function that calls these and returns a tuple, None in the place of a None. "
        "Those that allocator has returned ask once for the current device.");
}

}  // namespace deepcomm
