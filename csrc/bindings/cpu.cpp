// SPDX-License-Identifier: Apache-2.0
// deepcomm._C.cpu: the CPU backend's endpoint. Waits release the GIL.
#include "bindings/cpu.hpp"

#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include "bindings/bind.hpp"
#include "bindings/signals.hpp"
#include "bindings/torch_tensor.hpp"

namespace py = pybind11;

namespace deepcomm {
namespace {

using cpu::Endpoint;
using cpu::EndpointConfig;

void bind_endpoint(py::module_& module) {
    py::class_<cpu::Counters>(module, "Counters")
        .def_readonly("num_dispatches", &cpu::Counters::num_dispatches)
        .def_readonly("num_combines", &cpu::Counters::num_combines)
        .def_readonly("tokens_sent", &cpu::Counters::tokens_sent)
        .def_readonly("tokens_received", &cpu::Counters::tokens_received)
        .def_property_readonly("bytes_local",
                               [](const cpu::Counters& self) { return self.bytes_local.load(); })
        .def_property_readonly("bytes_node",
                               [](const cpu::Counters& self) { return self.bytes_node.load(); })
        .def_property_readonly("bytes_network",
                               [](const cpu::Counters& self) { return self.bytes_network.load(); })
        .def_readonly("wait_us", &cpu::Counters::wait_us)
        .def(
            "add_wait",
            [](cpu::Counters& self, int32_t rank, int64_t wait_us) {
                self.wait_us[static_cast<size_t>(rank)] += wait_us;
            },
            py::arg("rank"), py::arg("wait_us"));
    py::class_<Endpoint>(module, "Endpoint")
        .def(py::init([](const EndpointConfig& config, double timeout_s, double late_warning_s,
                         bool may_spin, std::function<void(const std::string&)> log_warning) {
                 return std::make_unique<Endpoint>(
                     config, cpu::WaitPolicy{timeout_s, late_warning_s, may_spin,
                                             std::move(log_warning), check_signals});
             }),
             py::arg("config"), py::arg("timeout_s"), py::arg("late_warning_s"),
             py::arg("may_spin"), py::arg("log_warning"))
        .def_property_readonly("segment_name", &Endpoint::segment_name)
        .def("connect", &Endpoint::connect, py::arg("names"), py::arg("pids"))
        .def("unlink", &Endpoint::unlink)
        .def_property_readonly("reserved_bytes", &Endpoint::reserved_bytes)
        .def_property_readonly("isa", [](const Endpoint& self) { return isa_name(self.isa()); })
        .def_property_readonly("counters", &Endpoint::counters,
                               py::return_value_policy::reference_internal)
        .def("continue_from", &Endpoint::continue_from, py::arg("other"))
        .def("check_usable", &Endpoint::check_usable, py::arg("kind"))
        .def_property_readonly("failed", &Endpoint::failed)
        .def_property_readonly("epoch", &Endpoint::epoch)
        .def_property_readonly("epoch_open", &Endpoint::epoch_open)
        .def("fail", &Endpoint::fail, py::arg("message"), py::arg("culprit"))
        .def("find_culprit", &Endpoint::find_culprit, py::call_guard<py::gil_scoped_release>())
        .def("finish_epoch", &Endpoint::finish_epoch, py::arg("epoch"))
        .def("close", &Endpoint::close)
        .def(
            "take_result",
            [](const Endpoint& self, int64_t num_bytes) {
                return make_tensor(self.results().take(num_bytes), kDlByte, {num_bytes});
            },
            py::arg("num_bytes"), "Uninitialised bytes, used again once their storage is freed.")
        .def_property_readonly("idle_result_bytes",
                               [](const Endpoint& self) { return self.results().idle_bytes(); })
        .def_property_readonly("max_idle_result_bytes", [](const Endpoint& self) {
            return self.results().max_idle_bytes();
        });
}

}  // namespace

void bind_cpu(py::module_& parent) {
    py::module_ module = parent.def_submodule("cpu", "The CPU backend.");
    bind_cpu_args(module);
    bind_endpoint(module);
    module.def("remove_stale_segments", &cpu::Segment::remove_stale,
               "Removes the names of segments whose owners died while constructing.");
    bind_cpu_operations(module);
}

}  // namespace deepcomm
