// SPDX-License-Identifier: Apache-2.0
// deepcomm._C.cpu: enumerations, arguments and records.
#include <pybind11/stl.h>

#include "bindings/cpu.hpp"
#include "cpu/low_latency.hpp"

namespace py = pybind11;

namespace deepcomm {
namespace {

using cpu::CombineArgs;
using cpu::DeliverTarget;
using cpu::DispatchArgs;
using cpu::DispatchRecord;
using cpu::EndpointConfig;
using cpu::LowLatencyCombineArgs;
using cpu::RowFormat;

using Record = std::shared_ptr<const DispatchRecord>;

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

void bind_args(py::module_& module) {
    py::class_<RowFormat>(module, "RowFormat")
        .def_static("make", &RowFormat::make, py::arg("dtype"), py::arg("scale_format"),
                    py::arg("hidden"))
        .def_readonly("row_bytes", &RowFormat::row_bytes)
        .def_readonly("scale_bytes", &RowFormat::scale_bytes);
    py::class_<cpu::RowInput> input(module, "RowInput");
    input.def_readwrite("scale_stride", &cpu::RowInput::scale_stride)
        .def_readwrite("dtype", &cpu::RowInput::dtype)
        .def_readwrite("quantize", &cpu::RowInput::quantize);
    def_address(input, "scales", &cpu::RowInput::scales);
    py::class_<DispatchArgs> dispatch(module, "DispatchArgs");
    dispatch.def(py::init<>())
        .def_readonly("input", &DispatchArgs::input)
        .def_readwrite("format", &DispatchArgs::format)
        .def_readwrite("num_topk", &DispatchArgs::num_topk)
        .def_readwrite("topk_idx_is_int64", &DispatchArgs::topk_idx_is_int64)
        .def_readwrite("recv_layout", &DispatchArgs::recv_layout)
        .def_readwrite("expert_alignment", &DispatchArgs::expert_alignment)
        .def_readwrite("capacity", &DispatchArgs::capacity)
        .def_readwrite("growable", &DispatchArgs::growable)
        .def_property(
            "cached", [](const DispatchArgs& self) { return self.cached; },
            [](DispatchArgs& self, Record record) { self.cached = std::move(record); });
    dispatch.def(
        "with_tensors",
        [](const DispatchArgs& self, uintptr_t rows, int64_t row_stride, int32_t num_tokens,
           uintptr_t topk_idx, uintptr_t topk_weights) {
            DispatchArgs args = self;
            args.input.rows = pointer<const std::byte>(rows);
            args.input.row_stride = row_stride;
            args.num_tokens = num_tokens;
            args.topk_idx = pointer<const void>(topk_idx);
            args.topk_weights = pointer<const float>(topk_weights);
            return args;
        },
        py::arg("rows"), py::arg("row_stride"), py::arg("num_tokens"), py::arg("topk_idx"),
        py::arg("topk_weights"), "The same arguments for other tensors.");
    py::class_<DeliverTarget> deliver(module, "DeliverTarget");
    deliver.def_readwrite("zero_padding", &DeliverTarget::zero_padding)
        .def_readwrite("stream", &DeliverTarget::stream);
    def_address(deliver, "x", &DeliverTarget::x);
    def_address(deliver, "scales", &DeliverTarget::scales);
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
        .def_readonly("num_recv", &cpu::Received::num_recv);
}

}  // namespace

void bind_cpu_args(py::module_& module) {
    bind_enums(module);
    bind_config(module);
    bind_args(module);
    bind_records(module);
}

}  // namespace deepcomm
