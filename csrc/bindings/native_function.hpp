// SPDX-License-Identifier: Apache-2.0
// Functions and methods that Python calls itself, for those that take less time than pybind11 takes to
// call them.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <memory>
#include <type_traits>
#include <typeinfo>
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

/// Calls an object of Python's.
template <typename... Arguments>
pybind11::object call(pybind11::handle function, const Arguments&... arguments) {
    // The free place before them is for the object of a bound method.
    PyObject* given[] = {nullptr, arguments.ptr()...};
    PyObject* const result = PyObject_Vectorcall(
        function.ptr(), given + 1, sizeof...(Arguments) | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr);
    if (result == nullptr) {
        throw pybind11::error_already_set();
    }
    return pybind11::reinterpret_steal<pybind11::object>(result);
}

/// Returns the value of an object of a bound class; that class is looked up once, not in each call.
template <typename Class>
Class& value_of(pybind11::handle object) {
    static PyObject* const type = pybind11::type::of<Class>().release().ptr();
    if (PyObject_TypeCheck(object.ptr(), reinterpret_cast<PyTypeObject*>(type)) == 0) {
        throw pybind11::type_error("expected an object of another class");
    }
    static const auto* const info = pybind11::detail::get_type_info(typeid(Class));
    auto* const instance = reinterpret_cast<pybind11::detail::instance*>(object.ptr());
    auto* const value = instance->get_value_and_holder(info).value_ptr();
    if (value == nullptr) {
        throw pybind11::type_error("expected an object that has been initialised");
    }
    return *static_cast<Class*>(value);
}

/// Returns an argument as a C++ function takes it: bound objects themselves, others as values.
template <typename T>
decltype(auto) argument(pybind11::handle given) {
    using Value = std::remove_cv_t<std::remove_reference_t<T>>;
    using Caster = pybind11::detail::make_caster<Value>;
    if constexpr (std::is_base_of_v<pybind11::detail::type_caster_generic, Caster>) {
        return value_of<std::remove_reference_t<T>>(given);
    } else {
        Caster caster;
        if (!caster.load(given, true)) {
            throw pybind11::type_error("expected an argument of another type");
        }
        return static_cast<Value>(pybind11::detail::cast_op<Value>(std::move(caster)));
    }
}

/// A function as what Python calls, without names and defaults of its arguments.
template <typename Result, typename Class, typename... Arguments>
struct Method {
    using Function = Result (*)(Class&, Arguments...);

    template <Function kFunction>
    static PyObject* call(PyObject* self, PyObject* const* given, Py_ssize_t num_given) noexcept {
        try {
            if (static_cast<size_t>(num_given) != sizeof...(Arguments)) {
                throw pybind11::type_error("expected another number of arguments");
            }
            return apply<kFunction>(self, given, std::index_sequence_for<Arguments...>());
        } catch (...) {
            pybind11::detail::try_translate_exceptions();
            return nullptr;
        }
    }

    template <Function kFunction, size_t... kIndices>
    static PyObject* apply(PyObject* self, PyObject* const* given,
                           std::index_sequence<kIndices...> /*all*/) {
        auto& value = value_of<Class>(self);
        if constexpr (std::is_void_v<Result>) {
            kFunction(value, argument<Arguments>(given[kIndices])...);
            return pybind11::none().release().ptr();
        } else {
            return pybind11::detail::make_caster<Result>::cast(
                       kFunction(value, argument<Arguments>(given[kIndices])...),
                       pybind11::return_value_policy::move, pybind11::handle())
                .ptr();
        }
    }
};

template <typename Result, typename Class, typename... Arguments>
Method<Result, Class, Arguments...> method_of(Result (*)(Class&, Arguments...));

/// Gives a bound class a method; the text begins with its signature, which stubs repeat.
template <auto kFunction, typename Bound>
void def_method(Bound& bound, const char* name, const char* text) {
    using Call = decltype(method_of(kFunction));
    static PyMethodDef definition{name,
                                  reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(
                                      &Call::template call<kFunction>)),
                                  METH_FASTCALL, text};
    auto* const type = reinterpret_cast<PyTypeObject*>(bound.ptr());
    PyObject* const method = PyDescr_NewMethod(type, &definition);
    if (method == nullptr) {
        throw pybind11::error_already_set();
    }
    bound.attr(name) = pybind11::reinterpret_steal<pybind11::object>(method);
}

}  // namespace deepcomm
