// SPDX-License-Identifier: Apache-2.0
// deepcomm._C.nccl: NCCL's library and communicators. All calls of NCCL release the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/address.hpp"
#include "bindings/bind.hpp"
#include "bindings/signals.hpp"
#include "host/device_communicator.hpp"

namespace py = pybind11;

namespace deepcomm {
namespace {

using host::Communicator;
using host::Nccl;
using host::Patience;
using host::Transfer;

using NoGil = py::call_guard<py::gil_scoped_release>;
using Spans = std::vector<std::tuple<int, uintptr_t, int64_t>>;

std::vector<Transfer> transfers_of(const Spans& spans) {
    std::vector<Transfer> transfers;
    transfers.reserve(spans.size());
    for (const auto& [peer, address, num_bytes] : spans) {
        transfers.push_back({peer, address, num_bytes});
    }
    return transfers;
}

void bind_library(py::module_& module) {
    py::class_<Nccl, std::shared_ptr<Nccl>>(module, "Library")
        .def_static("find", &Nccl::find, py::arg("path") = "", NoGil(),
                    "The one that is loaded, else the one at path, else the loader's.")
        .def_static("open", &Nccl::open, py::arg("path"), NoGil())
        .def_property_readonly("path", &Nccl::path)
        .def_property_readonly(
            "version", [](const Nccl& self) { return host::nccl_version_text(self.version()); })
        .def_property_readonly("was_loaded", &Nccl::was_loaded)
        .def("make_unique_id", [](const Nccl& self) {
            const auto id = [&self] {
                const py::gil_scoped_release release;
                return self.make_unique_id();
            }();
            return py::bytes(id.bytes, sizeof(id.bytes));
        });
}

void bind_communicator(py::module_& module) {
    py::class_<host::CommunicatorConfig>(module, "CommunicatorConfig")
        .def(py::init(
                 [](const std::string& name, int rank, int num_ranks, const py::bytes& unique_id) {
                     return host::CommunicatorConfig{name, rank, num_ranks, unique_id};
                 }),
             py::arg("name"), py::arg("rank"), py::arg("num_ranks"), py::arg("unique_id"))
        .def_readwrite("traffic_class", &host::CommunicatorConfig::traffic_class)
        .def_readwrite("max_ctas", &host::CommunicatorConfig::max_ctas);
    py::class_<Communicator, std::shared_ptr<Communicator>>(
        module, "Communicator", py::release_gil_before_calling_cpp_dtor())
        .def(py::init([](std::shared_ptr<host::Device> device, std::shared_ptr<Nccl> library,
                         const host::CommunicatorConfig& config, double timeout_s) {
                 const py::gil_scoped_release release;
                 return std::make_shared<Communicator>(std::move(device), std::move(library),
                                                       config, Patience{timeout_s, check_signals});
             }),
             py::arg("device"), py::arg("library"), py::arg("config"), py::arg("timeout_s"))
        .def(
            "move",
            [](Communicator& self, uintptr_t stream, const Spans& sends, const Spans& receives,
               double timeout_s) {
                self.move(pointer<host::cu::StreamObject>(stream),
                          {transfers_of(sends), transfers_of(receives)},
                          {timeout_s, check_signals});
            },
            py::arg("stream"), py::arg("sends"), py::arg("receives"), py::arg("timeout_s"), NoGil(),
            "Sends and receives are peer, address and number of bytes.")
        .def("abort", &Communicator::abort, NoGil())
        .def(
            "close",
            [](Communicator& self, double timeout_s) {
                return self.close({timeout_s, check_signals});
            },
            py::arg("timeout_s"), NoGil(), "What went wrong, or nothing.");
}

py::bytes bytes_of(const std::string& content) { return {content.data(), content.size()}; }

void bind_device_communicator(py::module_& module) {
    using host::DeviceCommunicator;
    py::class_<DeviceCommunicator>(module, "DeviceCommunicator",
                                   py::release_gil_before_calling_cpp_dtor())
        .def(py::init<std::shared_ptr<Communicator>>(), py::arg("communicator"), NoGil())
        .def(
            "query",
            [](const DeviceCommunicator& self, const py::bytes& properties, double timeout_s) {
                std::string filled = properties;
                {
                    const py::gil_scoped_release release;
                    filled = self.query(std::move(filled), {timeout_s, check_signals});
                }
                return bytes_of(filled);
            },
            py::arg("properties"), py::arg("timeout_s"), "The properties' bytes, filled in.")
        .def(
            "create",
            [](DeviceCommunicator& self, const py::bytes& requirements, int64_t num_bytes,
               double timeout_s) {
                const std::string asked = requirements;
                std::string made;
                {
                    const py::gil_scoped_release release;
                    made = self.create(asked, num_bytes, {timeout_s, check_signals});
                }
                return bytes_of(made);
            },
            py::arg("requirements"), py::arg("num_bytes"), py::arg("timeout_s"),
            "The bytes that kernels get; collective.")
        .def(
            "register_window",
            [](DeviceCommunicator& self, uintptr_t address, int64_t num_bytes, double timeout_s) {
                return self.register_window(address, num_bytes, {timeout_s, check_signals});
            },
            py::arg("address"), py::arg("num_bytes"), py::arg("timeout_s"), NoGil(),
            "The window's handle; collective.")
        .def(
            "deregister_window",
            [](DeviceCommunicator& self, uintptr_t window, double timeout_s) {
                self.deregister_window(window, {timeout_s, check_signals});
            },
            py::arg("window"), py::arg("timeout_s"), NoGil())
        .def(
            "close",
            [](DeviceCommunicator& self, double timeout_s) {
                self.close({timeout_s, check_signals});
            },
            py::arg("timeout_s"), NoGil(), "Before the communicator is closed.");
}

}  // namespace

void bind_nccl(py::module_& parent) {
    py::module_ module = parent.def_submodule("nccl", "NCCL's library, opened at run time.");
    bind_library(module);
    bind_communicator(module);
    bind_device_communicator(module);
}

}  // namespace deepcomm
