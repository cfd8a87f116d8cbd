// SPDX-License-Identifier: Apache-2.0
// deepcomm._C.cpu: the operations, phase by phase. Addresses are integers; the caller keeps the
// memory alive for the operation.
#include <pybind11/stl.h>

#include <cstring>
#include <optional>

#include "bindings/cpu.hpp"
#include "bindings/cpu_outputs.hpp"
#include "cpu/low_latency.hpp"

namespace py = pybind11;

namespace deepcomm {
namespace {

using cpu::CombineArgs;
using cpu::CombineOp;
using cpu::DeliverTarget;
using cpu::DispatchArgs;
using cpu::DispatchOp;
using cpu::DispatchRecord;
using cpu::Endpoint;
using cpu::LowLatencyCombineArgs;
using cpu::LowLatencyCombineOp;
using cpu::LowLatencyDispatchOp;
using cpu::OpSignature;
using cpu::Round;
using cpu::SlotRing;

std::vector<const std::byte*> addresses(const std::vector<uintptr_t>& values) {
    std::vector<const std::byte*> result;
    result.reserve(values.size());
    for (const uintptr_t value : values) {
        result.push_back(pointer<const std::byte>(value));
    }
    return result;
}

py::bytes bytes_of(const OpSignature& signature) {
    return {reinterpret_cast<const char*>(&signature), sizeof(signature)};
}

OpSignature signature_in(const py::bytes& bytes) {
    const std::string text = bytes;
    OpSignature signature{};
    DEEPCOMM_ASSERT(text.size() == sizeof(signature), "signature of %zu bytes", text.size());
    std::memcpy(&signature, text.data(), sizeof(signature));
    return signature;
}

DlDataType element_of(DType dtype) {
    switch (dtype) {
        case DType::kBf16: return kDlBf16;
        case DType::kF16: return kDlF16;
        case DType::kF32: return kDlF32;
        default: return kDlByte;  // DLPack 0.8 has no FP8
    }
}

std::optional<TorchTensor> lease_rows(const DispatchOp& op) {
    auto rows = op.lease_rows();
    if (rows == nullptr) {
        return std::nullopt;
    }
    const cpu::RowFormat& format = op.args().format;
    return make_tensor(std::move(rows), element_of(format.dtype),
                       {op.received().out_rows, format.hidden});
}

DispatchOutputs outputs_of(const DispatchOp& op, const Endpoint& endpoint, bool ids_are_int64) {
    const OutputSizes sizes{op.received().out_rows, endpoint.config().num_local_experts(),
                            op.args().capacity >= 0};
    return make_outputs(op.args(), op.routing(), sizes, ids_are_int64);
}

/// The shapes are fixed, whatever arrives.
DispatchOutputs low_latency_outputs(const LowLatencyDispatchOp& op, const Endpoint& endpoint,
                                    bool ids_are_int64) {
    const OutputSizes sizes{op.num_out_rows(), endpoint.config().num_local_experts(), true};
    return make_outputs(op.args(), op.routing(), sizes, ids_are_int64);
}

void bind_round(py::module_& module) {
    py::class_<Round>(module, "Round")
        .def_static(
            "refuse",
            [](Endpoint& endpoint, cpu::OpKind kind, const std::string& message) {
                const py::gil_scoped_release release;
                cpu::OpSignature signature{};
                signature.kind = kind;
                auto round = std::make_unique<Round>(endpoint, signature);
                endpoint.guarded([&] { round->abort(message); });
                return round;
            },
            py::arg("endpoint"), py::arg("kind"), py::arg("message"), py::keep_alive<0, 1>())
        .def_property_readonly("epoch", &Round::epoch)
        .def("serialized", [](const Round& self) { return py::bytes(self.serialized()); })
        .def(
            "relay",
            [](Round& self, int32_t node, const py::bytes& data) { self.relay(node, data); },
            py::arg("node"), py::arg("data"))
        .def("wait_all", guarded(&Round::wait_all), py::arg("endpoint"));
}

void bind_dispatch(py::module_& module) {
    py::class_<DispatchOp>(module, "DispatchOp")
        .def(py::init<Endpoint&, const DispatchArgs&>(), py::arg("endpoint"), py::arg("args"),
             py::keep_alive<1, 2>())
        .def("announce", guarded(&DispatchOp::announce), py::arg("endpoint"))
        .def_property_readonly("round", &DispatchOp::round,
                               py::return_value_policy::reference_internal)
        .def_property_readonly("record_bytes", &DispatchOp::record_bytes)
        .def("num_rows_to", &DispatchOp::num_rows_to, py::arg("node"))
        .def("num_rows_from", &DispatchOp::num_rows_from, py::arg("source"))
        .def(
            "pack",
            [](DispatchOp& self, int32_t node, int64_t begin, int64_t end, uintptr_t records) {
                const py::gil_scoped_release release;
                self.pack(node, begin, end, pointer<std::byte>(records));
            },
            py::arg("node"), py::arg("begin"), py::arg("end"), py::arg("records"))
        .def(
            "forward",
            [](DispatchOp& self, int32_t source, int64_t num, uintptr_t records) {
                const py::gil_scoped_release release;
                self.forward(source, num, pointer<const std::byte>(records));
            },
            py::arg("source"), py::arg("num"), py::arg("records"))
        .def("publish", &DispatchOp::publish, py::arg("source"))
        .def("push", guarded(&DispatchOp::push), py::arg("endpoint"))
        .def("receive", guarded(&DispatchOp::receive), py::arg("endpoint"))
        .def_property_readonly("received", &DispatchOp::received,
                               py::return_value_policy::reference_internal)
        .def("lease_rows", &lease_rows,
             "The rows where they lie (FP8 as bytes); their generation is leased until the storage "
             "is freed. None: they must be copied.")
        .def("make_outputs", &outputs_of, py::arg("endpoint"), py::arg("ids_are_int64"))
        .def(
            "finish",
            [](DispatchOp& self, const std::optional<DeliverTarget>& target) {
                const py::gil_scoped_release release;
                return std::const_pointer_cast<DispatchRecord>(
                    self.finish(target ? &*target : nullptr));
            },
            py::arg("target"));
}

void bind_combine(py::module_& module) {
    py::class_<CombineOp>(module, "CombineOp")
        .def(py::init<Endpoint&, const CombineArgs&>(), py::arg("endpoint"), py::arg("args"),
             py::keep_alive<1, 2>())
        .def("stage", guarded(&CombineOp::stage), py::arg("endpoint"))
        .def_property_readonly("round", &CombineOp::round,
                               py::return_value_policy::reference_internal)
        .def_property_readonly("record_bytes", &CombineOp::record_bytes)
        .def("num_rows_to", &CombineOp::num_rows_to, py::arg("source"))
        .def("num_rows_from", &CombineOp::num_rows_from, py::arg("node"))
        .def(
            "pack",
            [](CombineOp& self, int32_t source, int64_t begin, int64_t end, uintptr_t records) {
                const py::gil_scoped_release release;
                self.pack(source, begin, end, pointer<std::byte>(records));
            },
            py::arg("source"), py::arg("begin"), py::arg("end"), py::arg("records"))
        .def(
            "finish",
            [](CombineOp& self, Endpoint& endpoint, const std::vector<uintptr_t>& partials) {
                const py::gil_scoped_release release;
                endpoint.guarded([&] { self.finish(addresses(partials)); });
            },
            py::arg("endpoint"), py::arg("partials"));
}

void bind_slot_ring(py::module_& module) {
    py::class_<SlotRing>(module, "SlotRing")
        .def(py::init<Endpoint&>(), py::arg("endpoint"), py::keep_alive<1, 2>())
        .def("set_masked", &SlotRing::set_masked, py::arg("rank"), py::arg("masked"))
        .def("is_masked", &SlotRing::is_masked, py::arg("rank"))
        .def("connected", &SlotRing::connected, py::arg("source"), py::arg("destination"))
        .def("check_free", &SlotRing::check_free, py::arg("kind"))
        .def_property_readonly("num_in_flight", &SlotRing::num_in_flight)
        .def("open", &SlotRing::open)
        .def("close", &SlotRing::close, py::arg("epoch"))
        .def(
            "abort",
            [](SlotRing& self, Endpoint& endpoint, uint64_t epoch, cpu::OpKind kind,
               const std::string& message) {
                const py::gil_scoped_release release;
                endpoint.guarded([&] { self.abort(epoch, kind, message); });
            },
            py::arg("endpoint"), py::arg("epoch"), py::arg("kind"), py::arg("message"))
        .def("continue_from", &SlotRing::continue_from, py::arg("other"));
}

void bind_low_latency(py::module_& module) {
    module.attr("SIGNATURE_BYTES") = sizeof(OpSignature);
    module.def(
        "check_same_signature",
        [](const py::bytes& own, int32_t own_rank, const py::bytes& other, int32_t other_rank) {
            cpu::check_same_signature(signature_in(own), own_rank, signature_in(other), other_rank);
        },
        py::arg("own"), py::arg("own_rank"), py::arg("other"), py::arg("other_rank"),
        "Raises ConfigMismatch for the first field in which low-latency calls differ.");
    using Dispatch = LowLatencyDispatchOp;
    py::class_<Dispatch>(module, "LowLatencyDispatchOp")
        .def(py::init<Endpoint&, SlotRing&, const DispatchArgs&, bool>(), py::arg("endpoint"),
             py::arg("ring"), py::arg("args"), py::arg("mask_late"), py::keep_alive<1, 2>(),
             py::keep_alive<1, 3>())
        .def_property_readonly("epoch", &Dispatch::epoch)
        .def_property_readonly("signature",
                               [](const Dispatch& self) { return bytes_of(self.signature()); })
        .def_property_readonly("num_out_rows", &Dispatch::num_out_rows)
        .def("make_outputs", &low_latency_outputs, py::arg("endpoint"), py::arg("ids_are_int64"))
        .def("send", guarded(&Dispatch::send), py::arg("endpoint"))
        .def_property_readonly("record_bytes", &Dispatch::record_bytes)
        .def("num_rows_to", &Dispatch::num_rows_to, py::arg("node"))
        .def(
            "pack",
            [](Dispatch& self, int32_t node, uintptr_t records) {
                self.pack(node, pointer<std::byte>(records));
            },
            py::arg("node"), py::arg("records"))
        .def(
            "forward",
            [](Dispatch& self, Endpoint& endpoint, int32_t source, int64_t num, uintptr_t records) {
                const py::gil_scoped_release release;
                endpoint.guarded(
                    [&] { self.forward(source, num, pointer<const std::byte>(records)); });
            },
            py::arg("endpoint"), py::arg("source"), py::arg("num"), py::arg("records"))
        .def(
            "forward_abort",
            [](Dispatch& self, Endpoint& endpoint, int32_t source, int32_t refused_by,
               const std::string& message) {
                const py::gil_scoped_release release;
                endpoint.guarded([&] { self.forward_abort(source, {refused_by, message}); });
            },
            py::arg("endpoint"), py::arg("source"), py::arg("refused_by"), py::arg("message"))
        .def(
            "forward_absence",
            [](Dispatch& self, Endpoint& endpoint, int32_t source) {
                const py::gil_scoped_release release;
                endpoint.guarded([&] { self.forward_absence(source); });
            },
            py::arg("endpoint"), py::arg("source"))
        .def(
            "forward_mismatch",
            [](Dispatch& self, Endpoint& endpoint, int32_t source, const py::bytes& signature) {
                const OpSignature asked = signature_in(signature);
                const py::gil_scoped_release release;
                endpoint.guarded([&] { self.forward_mismatch(source, asked); });
            },
            py::arg("endpoint"), py::arg("source"), py::arg("signature"))
        .def("receive", guarded(&Dispatch::receive), py::arg("endpoint"))
        .def_property_readonly("received", &Dispatch::received,
                               py::return_value_policy::reference_internal)
        .def("deliver_to", guarded(&Dispatch::deliver_to), py::arg("endpoint"), py::arg("target"))
        .def_property_readonly("record", [](const Dispatch& self) {
            return std::const_pointer_cast<DispatchRecord>(self.record());
        });
    using Combine = LowLatencyCombineOp;
    py::class_<Combine>(module, "LowLatencyCombineOp")
        .def(py::init<Endpoint&, SlotRing&, const LowLatencyCombineArgs&>(), py::arg("endpoint"),
             py::arg("ring"), py::arg("args"), py::keep_alive<1, 2>(), py::keep_alive<1, 3>())
        .def_property_readonly("epoch", &Combine::epoch)
        .def_property_readonly("signature",
                               [](const Combine& self) { return bytes_of(self.signature()); })
        .def("open", guarded(&Combine::open), py::arg("endpoint"))
        .def("num_weights_to", &Combine::num_weights_to, py::arg("node"))
        .def(
            "pack_weights",
            [](const Combine& self, int32_t node, uintptr_t weights) {
                self.pack_weights(node, pointer<float>(weights));
            },
            py::arg("node"), py::arg("weights"))
        .def(
            "forward_weights",
            [](Combine& self, Endpoint& endpoint, int32_t source, uintptr_t weights) {
                const py::gil_scoped_release release;
                endpoint.guarded(
                    [&] { self.forward_weights(source, pointer<const float>(weights)); });
            },
            py::arg("endpoint"), py::arg("source"), py::arg("weights"))
        .def("wait_weights", guarded(&Combine::wait_weights), py::arg("endpoint"))
        .def("send", guarded(&Combine::send), py::arg("endpoint"))
        .def_property_readonly("record_bytes", &Combine::record_bytes)
        .def("num_rows_to", &Combine::num_rows_to, py::arg("source"))
        .def(
            "pack",
            [](Combine& self, Endpoint& endpoint, int32_t source, uintptr_t records) {
                const py::gil_scoped_release release;
                endpoint.guarded([&] { self.pack(source, pointer<std::byte>(records)); });
            },
            py::arg("endpoint"), py::arg("source"), py::arg("records"))
        .def(
            "finish",
            [](Combine& self, Endpoint& endpoint, const std::vector<uintptr_t>& partials) {
                const py::gil_scoped_release release;
                endpoint.guarded([&] { self.finish(addresses(partials)); });
            },
            py::arg("endpoint"), py::arg("partials"));
}

}  // namespace

void bind_cpu_operations(py::module_& module) {
    bind_cpu_outputs(module);
    bind_round(module);
    bind_dispatch(module);
    bind_combine(module);
    bind_slot_ring(module);
    bind_low_latency(module);
}

}  // namespace deepcomm
