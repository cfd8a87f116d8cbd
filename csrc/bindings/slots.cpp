// SPDX-License-Identifier: Apache-2.0
// deepcomm._C.slots: objects of Python classes whose fields are slots, as those of dataclasses, which
// Python fills by a call for each.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bind.hpp"

namespace py = pybind11;

namespace deepcomm {
namespace {

/// What a maker makes: kept by the capsule that Python passes to its function.
struct Recipe {
    py::type type;
    std::vector<py::object> slots;
    py::tuple no_arguments;

    static const Recipe& of(PyObject* capsule) {
        return *static_cast<const Recipe*>(PyCapsule_GetPointer(capsule, nullptr));
    }
};

std::vector<py::object> find_slots(const py::type& type, const std::vector<std::string>& names) {
    std::vector<py::object> slots;
    for (const std::string& name : names) {
        py::object slot = type.attr(name.c_str());
        if (Py_TYPE(slot.ptr())->tp_descr_set == nullptr) {
            throw py::type_error(name + ": expected the name of a slot");
        }
        slots.push_back(std::move(slot));
    }
    return slots;
}

PyObject* make_filled(PyObject* capsule, PyObject* const* values, Py_ssize_t num_values) {
    const Recipe& recipe = Recipe::of(capsule);
    if (static_cast<size_t>(num_values) != recipe.slots.size()) {
        PyErr_SetString(PyExc_TypeError, "expected a value for each slot");
        return nullptr;
    }
    auto* const type = reinterpret_cast<PyTypeObject*>(recipe.type.ptr());
    auto made =
        py::reinterpret_steal<py::object>(type->tp_new(type, recipe.no_arguments.ptr(), nullptr));
    if (!made) {
        return nullptr;
    }
    for (const py::object& slot : recipe.slots) {
        if (Py_TYPE(slot.ptr())->tp_descr_set(slot.ptr(), made.ptr(), *values++) != 0) {
            return nullptr;
        }
    }
    return made.release().ptr();
}

/// Called by Python itself: pybind11 would take as long to pass the values on as setting them takes.
PyMethodDef maker_definition{
    "make", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&make_filled)),
    METH_FASTCALL, "Return an object with these values of its slots."};

py::function make_maker(py::type type, const std::vector<std::string>& names) {
    std::vector<py::object> slots = find_slots(type, names);
    auto recipe = std::make_unique<Recipe>(Recipe{std::move(type), std::move(slots), py::tuple()});
    const py::capsule capsule(recipe.get(), [](void* kept) { delete static_cast<Recipe*>(kept); });
    recipe.release();
    PyObject* const maker = PyCFunction_New(&maker_definition, capsule.ptr());
    if (maker == nullptr) {
        throw py::error_already_set();
    }
    return py::reinterpret_steal<py::function>(maker);
}

}  // namespace

void bind_slots(py::module_& parent) {
    py::module_ module = parent.def_submodule("slots", "Objects whose fields are slots.");
    module.def(
        "maker", &make_maker, py::arg("type"), py::arg("names"),
        "Return a function that makes an object of the slots' values, without its constructor.");
}

}  // namespace deepcomm
