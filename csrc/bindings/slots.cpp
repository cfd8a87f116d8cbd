// SPDX-License-Identifier: Apache-2.0
// deepcomm._C.slots: objects of Python classes whose fields are slots, as those of frozen dataclasses,
// which Python fills by a call for each.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "bindings/bind.hpp"

namespace py = pybind11;

namespace deepcomm {
namespace {

using Slots = std::vector<py::object>;

Slots find_slots(const py::type& type, const std::vector<std::string>& names) {
    Slots slots;
    for (const std::string& name : names) {
        py::object slot = type.attr(name.c_str());
        if (Py_TYPE(slot.ptr())->tp_descr_set == nullptr) {
            throw py::type_error(name + ": expected the name of a slot");
        }
        slots.push_back(std::move(slot));
    }
    return slots;
}

py::object make_filled(const py::type& type, const Slots& slots, const py::args& values) {
    if (values.size() != slots.size()) {
        throw py::type_error("expected a value for each slot");
    }
    auto* const python_type = reinterpret_cast<PyTypeObject*>(type.ptr());
    const auto object = py::reinterpret_steal<py::object>(
        python_type->tp_new(python_type, py::tuple().ptr(), nullptr));
    if (!object) {
        throw py::error_already_set();
    }
    auto value = values.begin();
    for (const py::object& slot : slots) {
        if (Py_TYPE(slot.ptr())->tp_descr_set(slot.ptr(), object.ptr(), (*value++).ptr()) != 0) {
            throw py::error_already_set();
        }
    }
    return object;
}

}  // namespace

void bind_slots(py::module_& parent) {
    py::module_ module = parent.def_submodule("slots", "Objects whose fields are slots.");
    module.def(
        "maker",
        [](py::type type, const std::vector<std::string>& names) {
            Slots slots = find_slots(type, names);
            return py::cpp_function(
                [type = std::move(type), slots = std::move(slots)](const py::args& values) {
                    return make_filled(type, slots, values);
                });
        },
        py::arg("type"), py::arg("names"),
        "Return a function that makes an object of the slots' values, without its constructor.");
}

}  // namespace deepcomm
