// SPDX-License-Identifier: Apache-2.0
#include "bindings/prepared_launch.hpp"

#include <pybind11/gil_simple.h>

#include <utility>

#include "bindings/address.hpp"
#include "bindings/native_function.hpp"

namespace py = pybind11;

namespace deepcomm {
namespace {

PyObject* launch(PyObject* self, PyObject* /*none*/) {
    try {
        const auto& prepared = state_of<PreparedLaunch>(self);
        const py::object stream = call(prepared.current_stream);
        const auto address = stream.cast<uintptr_t>();
        const py::gil_scoped_release_simple release;
        prepared.function->launch(prepared.grid, prepared.params, prepared.num_bytes,
                                  pointer<host::cu::StreamObject>(address));
    } catch (...) {
        py::detail::try_translate_exceptions();
        return nullptr;
    }
    return Py_NewRef(Py_None);
}

PyMethodDef definition{"launch", &launch, METH_NOARGS, "Launch on the current stream."};

}  // namespace

py::function prepare_launch(PreparedLaunch launch) {
    return make_function(definition, std::move(launch));
}

}  // namespace deepcomm
