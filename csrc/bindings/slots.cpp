// SPDX-License-Identifier: Apache-2.0
// deepcomm._C.slots: objects of Python classes whose fields are slots, as those of dataclasses, which
// Python fills by a call for each.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <structmember.h>

#include <string>
#include <utility>
#include <vector>

#include "bindings/bind.hpp"
#include "bindings/native_function.hpp"

namespace py = pybind11;

namespace deepcomm {
namespace {

/// What a maker makes.
struct Recipe {
    py::type type;
    std::vector<Py_ssize_t> offsets;  ///< of the slots whose values are given
    std::vector<std::pair<Py_ssize_t, py::object>> others;
    py::tuple no_arguments;
};

/// Returns where objects of a class hold the value of a slot, null while there is none.
Py_ssize_t find_slot(const py::type& type, const std::string& name) {
    const py::object slot = type.attr(name.c_str());
    if (Py_TYPE(slot.ptr()) == &PyMemberDescr_Type) {
        const PyMemberDef& member = *reinterpret_cast<PyMemberDescrObject*>(slot.ptr())->d_member;
        const bool is_of_type = PyType_IsSubtype(reinterpret_cast<PyTypeObject*>(type.ptr()),
                                                 PyDescr_TYPE(slot.ptr())) != 0;
        if (is_of_type && member.type == T_OBJECT_EX) {
            return member.offset;
        }
    }
    throw py::type_error(name + ": expected the name of a slot");
}

void fill(py::handle made, Py_ssize_t offset, PyObject* value) {
    auto* const slot = reinterpret_cast<PyObject**>(reinterpret_cast<char*>(made.ptr()) + offset);
    Py_XSETREF(*slot, Py_NewRef(value));
}

PyObject* make_filled(PyObject* self, PyObject* const* values, Py_ssize_t num_values) {
    const Recipe& recipe = state_of<Recipe>(self);
    if (static_cast<size_t>(num_values) != recipe.offsets.size()) {
        PyErr_SetString(PyExc_TypeError, "expected a value for each slot");
        return nullptr;
    }
    auto* const type = reinterpret_cast<PyTypeObject*>(recipe.type.ptr());
    PyObject* const made = type->tp_new(type, recipe.no_arguments.ptr(), nullptr);
    if (made == nullptr) {
        return nullptr;
    }
    if (Py_TYPE(made) != type) {
        Py_DECREF(made);
        PyErr_SetString(PyExc_TypeError, "expected a class that makes objects of its own");
        return nullptr;
    }
    for (const Py_ssize_t offset : recipe.offsets) {
        fill(made, offset, *values++);
    }
    for (const auto& [offset, value] : recipe.others) {
        fill(made, offset, value.ptr());
    }
    return made;
}

PyMethodDef maker_definition{
    "make", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&make_filled)),
    METH_FASTCALL, "Return an object with these values of its slots."};

py::function make_maker(const py::type& type, const std::vector<std::string>& names,
                        const py::dict& others) {
    Recipe recipe{type, {}, {}, py::tuple()};
    for (const std::string& name : names) {
        recipe.offsets.push_back(find_slot(type, name));
    }
    for (const auto& [name, value] : others) {
        recipe.others.emplace_back(find_slot(type, name.cast<std::string>()),
                                   py::reinterpret_borrow<py::object>(value));
    }
    return make_function(maker_definition, std::move(recipe));
}

}  // namespace

void bind_slots(py::module_& parent) {
    py::module_ module = parent.def_submodule("slots", "Objects whose fields are slots.");
    module.def(
        "maker", &make_maker, py::arg("type"), py::arg("names"), py::arg("others") = py::dict(),
        "Return a function that makes an object of the slots' values, in this order, without its "
        "constructor; the others have the same value in each.");
}

}  // namespace deepcomm
