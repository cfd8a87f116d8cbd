// SPDX-License-Identifier: Apache-2.0
// deepcomm._C.cpu: the CPU backend. Addresses are integers; the caller keeps the memory alive for
// the operation. Waits release the GIL.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/bind.hpp"
#include "bindings/dlpack.hpp"
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
using cpu::EndpointConfig;
using cpu::LowLatencyCombineArgs;
using cpu::LowLatencyCombineOp;
using cpu::LowLatencyDispatchOp;
using cpu::Round;
using cpu::RowFormat;
using cpu::SlotRing;

using Record = std::shared_ptr<const DispatchRecord>;

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

/// Runs a method of an operation under its endpoint's guard, without the GIL.
template <typename Op, typename Result, typename... Args>
auto guarded(Result (Op::*method)(Args...)) {
    return [method](Op& op, Endpoint& endpoint, Args... args) {
        const py::gil_scoped_release release;
        return endpoint.guarded([&] { return (op.*method)(std::forward<Args>(args)...); });
    };
}

void check_signals() {
    const py::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) {
        throw py::error_already_set();
    }
}

std::vector<const std::byte*> addresses(const std::vector<uintptr_t>& values) {
    std::vector<const std::byte*> result;
    result.reserve(values.size());
    for (const uintptr_t value : values) {
        result.push_back(pointer<const std::byte>(value));
    }
    return result;
}

/// Writable property of a struct that holds an address.
template <typename Class, typename Struct, typename T>
void def_address(Class& bound, const char* name, T* Struct::* member) {
    bound.def_property(
        name, [member](const Struct& self) { return reinterpret_cast<uintptr_t>(self.*member); },
        [member](Struct& self, uintptr_t value) { self.*member = pointer<T>(value); });
}

void bind_enums(py::module_& module) {
    py::enum_<DType>(module, "DType")
        .value("BF16", DType::kBf16)
        .value("F16", DType::kF16)
        .value("F32", DType::kF32)
        .value("FP8_E4M3", DType::kFp8E4m3);
    py::enum_<ScaleFormat>(module, "ScaleFormat")
        .value("NONE", ScaleFormat::kNone)
        .value("FP32", ScaleFormat::kFp32)
        .value("UE8M0", ScaleFormat::kUe8m0);
    py::enum_<RecvLayout>(module, "RecvLayout")
        .value("TOKEN", RecvLayout::kToken)
        .value("EXPERT", RecvLayout::kExpert)
        .value("EXPERT_PADDED", RecvLayout::kExpertPadded);
    py::enum_<cpu::OpKind>(module, "OpKind")
        .value("DISPATCH", cpu::OpKind::kDispatch)
        .value("COMBINE", cpu::OpKind::kCombine)
        .value("LOW_LATENCY_DISPATCH", cpu::OpKind::kLowLatencyDispatch)
        .value("LOW_LATENCY_COMBINE", cpu::OpKind::kLowLatencyCombine);
}

void bind_config(py::module_& module) {
    py::class_<EndpointConfig>(module, "EndpointConfig")
        .def(py::init<>())
        .def_readwrite("rank", &EndpointConfig::rank)
        .def_readwrite("num_ranks", &EndpointConfig::num_ranks)
        .def_readwrite("ranks_per_node", &EndpointConfig::ranks_per_node)
        .def_readwrite("num_experts", &EndpointConfig::num_experts)
        .def_readwrite("num_topk", &EndpointConfig::num_topk)
        .def_readwrite("hidden", &EndpointConfig::hidden)
        .def_readwrite("max_tokens", &EndpointConfig::max_tokens)
        .def_readwrite("num_generations", &EndpointConfig::num_generations)
        .def_readwrite("num_slots", &EndpointConfig::num_slots)
        .def_readwrite("num_threads", &EndpointConfig::num_threads);
    module.def(
        "reserved_bytes",
        [](const EndpointConfig& config) {
            const auto shape = config.shape();
            return layout::SegmentLayout::make(shape).reserved_bytes(shape);
        },
        py::arg("config"), "Bytes of shared memory one rank reserves at construction.");
    module.def(
        "low_latency_bytes",
        [](const EndpointConfig& config, int64_t row_bytes, int64_t scale_bytes) {
            const auto shape = config.shape();
            const auto record = layout::TokenRecord::make(row_bytes, scale_bytes, config.num_topk);
            return config.num_slots * (layout::SegmentLayout::make(shape).slot_blocks +
                                       shape.max_rows() * record.stride);
        },
        py::arg("config"), py::arg("row_bytes"), py::arg("scale_bytes"),
        "Bytes of shared memory that the first low-latency operation adds.");
}

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
        .def("rows_reserved", &Endpoint::rows_reserved, py::arg("generation"))
        .def("check_usable", &Endpoint::check_usable, py::arg("kind"))
        .def_property_readonly("failed", &Endpoint::failed)
        .def("fail", &Endpoint::fail, py::arg("message"), py::arg("culprit"))
        .def("finish_epoch", &Endpoint::finish_epoch, py::arg("epoch"))
        .def("close", &Endpoint::close)
        .def(
            "lease",
            [](const Endpoint& self, int32_t generation, int64_t offset, int64_t num_bytes) {
                return lease_capsule(self.leases(), generation, offset, num_bytes);
            },
            py::arg("generation"), py::arg("offset"), py::arg("num_bytes"),
            "DLPack capsule of bytes; the generation is leased until its storage is freed.");
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
        .def("wait_all", guarded(&Round::wait_all), py::arg("endpoint"))
        .def("max_tokens", &Round::max_tokens);
}

void bind_args(py::module_& module) {
    py::class_<RowFormat>(module, "RowFormat")
        .def_static("make", &RowFormat::make, py::arg("dtype"), py::arg("scale_format"),
                    py::arg("hidden"))
        .def_readonly("row_bytes", &RowFormat::row_bytes)
        .def_readonly("scale_bytes", &RowFormat::scale_bytes);
    py::class_<cpu::RowInput> input(module, "RowInput");
    input.def_readwrite("row_stride", &cpu::RowInput::row_stride)
        .def_readwrite("scale_stride", &cpu::RowInput::scale_stride)
        .def_readwrite("dtype", &cpu::RowInput::dtype)
        .def_readwrite("quantize", &cpu::RowInput::quantize);
    def_address(input, "rows", &cpu::RowInput::rows);
    def_address(input, "scales", &cpu::RowInput::scales);
    py::class_<DispatchArgs> dispatch(module, "DispatchArgs");
    dispatch.def(py::init<>())
        .def_readonly("input", &DispatchArgs::input)
        .def_readwrite("format", &DispatchArgs::format)
        .def_readwrite("num_tokens", &DispatchArgs::num_tokens)
        .def_readwrite("num_topk", &DispatchArgs::num_topk)
        .def_readwrite("topk_idx_is_int64", &DispatchArgs::topk_idx_is_int64)
        .def_readwrite("recv_layout", &DispatchArgs::recv_layout)
        .def_readwrite("expert_alignment", &DispatchArgs::expert_alignment)
        .def_readwrite("capacity", &DispatchArgs::capacity)
        .def_readwrite("growable", &DispatchArgs::growable)
        .def_property(
            "cached", [](const DispatchArgs& self) { return self.cached; },
            [](DispatchArgs& self, Record record) { self.cached = std::move(record); });
    def_address(dispatch, "topk_idx", &DispatchArgs::topk_idx);
    def_address(dispatch, "topk_weights", &DispatchArgs::topk_weights);
    py::class_<DeliverTarget> deliver(module, "DeliverTarget");
    deliver.def(py::init<>())
        .def_readwrite("topk_idx_is_int64", &DeliverTarget::topk_idx_is_int64)
        .def_readwrite("zero_padding", &DeliverTarget::zero_padding)
        .def_readwrite("stream", &DeliverTarget::stream);
    def_address(deliver, "x", &DeliverTarget::x);
    def_address(deliver, "scales", &DeliverTarget::scales);
    def_address(deliver, "topk_idx", &DeliverTarget::topk_idx);
    def_address(deliver, "topk_weights", &DeliverTarget::topk_weights);
    def_address(deliver, "counts", &DeliverTarget::counts);
    def_address(deliver, "offsets", &DeliverTarget::offsets);
    py::class_<cpu::ExpertOutputs> outputs(module, "ExpertOutputs");
    outputs.def_readwrite("row_stride", &cpu::ExpertOutputs::row_stride);
    def_address(outputs, "y", &cpu::ExpertOutputs::y);
    def_address(outputs, "topk_weights", &cpu::ExpertOutputs::topk_weights);
    def_address(outputs, "apply_weights", &cpu::ExpertOutputs::apply_weights);
    py::class_<cpu::CombineTarget> target(module, "CombineTarget");
    target.def_readwrite("bias_stride", &cpu::CombineTarget::bias_stride);
    def_address(target, "out", &cpu::CombineTarget::out);
    def_address(target, "bias", &cpu::CombineTarget::bias);
    def_address(target, "topk_weights", &cpu::CombineTarget::topk_weights);
    py::class_<CombineArgs>(module, "CombineArgs")
        .def(py::init<>())
        .def_readonly("outputs", &CombineArgs::outputs)
        .def_readonly("target", &CombineArgs::target)
        .def_readwrite("format", &CombineArgs::format)
        .def_readwrite("apply_weights", &CombineArgs::apply_weights)
        .def_property(
            "record", [](const CombineArgs& self) { return self.record; },
            [](CombineArgs& self, Record record) { self.record = std::move(record); });
    py::class_<LowLatencyCombineArgs> low_latency(module, "LowLatencyCombineArgs");
    low_latency.def(py::init<>())
        .def_readonly("combine", &LowLatencyCombineArgs::combine)
        .def_readwrite("mask_late", &LowLatencyCombineArgs::mask_late);
    def_address(low_latency, "source_weights", &LowLatencyCombineArgs::source_weights);
}

void bind_records(py::module_& module) {
    py::class_<DispatchRecord, std::shared_ptr<DispatchRecord>>(module, "DispatchRecord")
        .def_readonly("epoch", &DispatchRecord::epoch)
        .def_property_readonly("recv_weights_address", [](const DispatchRecord& self) {
            return reinterpret_cast<uintptr_t>(self.received.topk_weights.data());
        });
    py::class_<cpu::Received>(module, "Received")
        .def_readonly("num_rows", &cpu::Received::num_rows)
        .def_readonly("out_rows", &cpu::Received::out_rows)
        .def_readonly("num_recv", &cpu::Received::num_recv)
        .def_readonly("counts", &cpu::Received::counts);
}

void bind_dispatch(py::module_& module) {
    py::class_<DispatchOp>(module, "DispatchOp")
        .def(py::init<Endpoint&, const DispatchArgs&>(), py::arg("endpoint"), py::arg("args"),
             py::keep_alive<1, 2>())
        .def("announce", guarded(&DispatchOp::announce), py::arg("endpoint"))
        .def_property_readonly("round", &DispatchOp::round,
                               py::return_value_policy::reference_internal)
        .def("plan", &DispatchOp::plan)
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
        .def_property_readonly("rows_in_place", &DispatchOp::rows_in_place)
        .def_property_readonly("leasable", &DispatchOp::leasable)
        .def_property_readonly("generation", &DispatchOp::generation)
        .def_property_readonly("rows_offset", &DispatchOp::rows_offset)
        .def_property_readonly("overflow", &DispatchOp::overflow)
        .def_property_readonly("received", &DispatchOp::received,
                               py::return_value_policy::reference_internal)
        .def(
            "deliver_to",
            [](DispatchOp& self, const DeliverTarget& target) {
                const py::gil_scoped_release release;
                self.deliver_to(target);
            },
            py::arg("target"))
        .def("finish", [](DispatchOp& self) {
            return std::const_pointer_cast<DispatchRecord>(self.finish());
        });
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
        .def("open", &SlotRing::open)
        .def("close", &SlotRing::close, py::arg("epoch"))
        .def("abort", &SlotRing::abort, py::arg("epoch"), py::arg("kind"), py::arg("message"))
        .def("continue_from", &SlotRing::continue_from, py::arg("other"));
}

void bind_low_latency(py::module_& module) {
    using Dispatch = LowLatencyDispatchOp;
    py::class_<Dispatch>(module, "LowLatencyDispatchOp")
        .def(py::init<Endpoint&, SlotRing&, const DispatchArgs&, bool>(), py::arg("endpoint"),
             py::arg("ring"), py::arg("args"), py::arg("mask_late"), py::keep_alive<1, 2>(),
             py::keep_alive<1, 3>())
        .def_property_readonly("epoch", &Dispatch::epoch)
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
        .def("forward_abort", &Dispatch::forward_abort, py::arg("source"), py::arg("message"))
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
        .def("open", guarded(&Combine::open), py::arg("endpoint"))
        .def("num_weights_to", &Combine::num_weights_to, py::arg("node"))
        .def("num_weights_from", &Combine::num_weights_from, py::arg("source"))
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
        .def("num_rows_from", &Combine::num_rows_from, py::arg("node"))
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

void bind_cpu(py::module_& parent) {
    py::module_ module = parent.def_submodule("cpu", "The CPU backend.");
    bind_enums(module);
    bind_config(module);
    bind_endpoint(module);
    bind_args(module);
    bind_records(module);
    bind_round(module);
    bind_dispatch(module);
    bind_combine(module);
    bind_slot_ring(module);
    bind_low_latency(module);
}

}  // namespace deepcomm
