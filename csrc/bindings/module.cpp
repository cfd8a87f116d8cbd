// SPDX-License-Identifier: Apache-2.0
// deepcomm._C: the module and the translation of exceptions to deepcomm.errors.
#include <pybind11/pybind11.h>

#include "bindings/bind.hpp"
#include "common/error.hpp"

namespace py = pybind11;

namespace deepcomm {
namespace {

void raise(const char* name, const Error& error) {
    const py::object type = py::module_::import("deepcomm.errors").attr(name);
    const auto* const comm = dynamic_cast<const CommError*>(&error);
    const py::object value = comm == nullptr  ? type(error.what())
                             : comm->peer < 0 ? type(error.what(), py::none())
                                              : type(error.what(), comm->peer);
    PyErr_SetObject(type.ptr(), value.ptr());
}

void translate(std::exception_ptr pointer) {
    try {
        if (pointer) {
            std::rethrow_exception(pointer);
        }
    } catch (const InvalidArgument& error) {
        raise("InvalidArgument", error);
    } catch (const ConfigMismatch& error) {
        raise("ConfigMismatch", error);
    } catch (const InternalError& error) {
        raise("InternalError", error);
    } catch (const CudaError& error) {
        raise("CudaError", error);
    } catch (const NcclError& error) {
        raise("NcclError", error);
    } catch (const CommTimeout& error) {
        raise("CommTimeout", error);
    } catch (const CommError& error) {
        raise("CommError", error);
    }
}

}  // namespace
}  // namespace deepcomm

PYBIND11_MODULE(_C, module) {
    module.doc() = "Native part of deepcomm.";
    py::register_exception_translator(&deepcomm::translate);
    deepcomm::bind_simd(module);
    deepcomm::bind_slots(module);
    deepcomm::bind_cpu(module);
    deepcomm::bind_cuda(module);  // whose functions the kernels' arguments are launched with
    deepcomm::bind_kernels(module);
    deepcomm::bind_kernels_low_latency(module);
    deepcomm::bind_low_latency_calls(module);
    deepcomm::bind_allocators(module);
    deepcomm::bind_nccl(module);
}
