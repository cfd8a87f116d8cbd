// SPDX-License-Identifier: Apache-2.0
// deepcomm._C.kernels: the arguments of the low-latency kernels and the map of their memory.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <string_view>
#include <utility>

#include "bindings/address.hpp"
#include "bindings/bind.hpp"
#include "bindings/low_latency_arguments.hpp"
#include "bindings/native_function.hpp"
#include "kernels/low_latency/params.hpp"

namespace py = pybind11;

namespace deepcomm {
namespace {

using kernels::LowLatencyCombineParams;
using kernels::LowLatencyDispatchParams;
using kernels::LowLatencyMarkParams;
using kernels::LowLatencyMaskParams;
using kernels::LowLatencyParams;
using kernels::LowLatencyRefuseParams;
using layout::LowLatencyLayout;
using layout::LowLatencyRecordLayout;
using layout::LowLatencyShape;

using TimeoutsNs = std::array<uint64_t, kernels::kNumLowLatencyRoles>;

void bind_maps(py::module_& module) {
    py::class_<LowLatencyShape>(module, "LowLatencyShape")
        .def(py::init<>())
        .def_readwrite("num_ranks", &LowLatencyShape::num_ranks)
        .def_readwrite("num_experts", &LowLatencyShape::num_experts)
        .def_readwrite("num_topk", &LowLatencyShape::num_topk)
        .def_readwrite("hidden", &LowLatencyShape::hidden)
        .def_readwrite("max_tokens", &LowLatencyShape::max_tokens)
        .def_readwrite("num_slots", &LowLatencyShape::num_slots)
        .def_readwrite("ranks_per_node", &LowLatencyShape::ranks_per_node)
        .def_readwrite("is_carried", &LowLatencyShape::is_carried)
        .def_property_readonly("token_words", &LowLatencyShape::token_words);
    py::class_<LowLatencyLayout>(module, "LowLatencyLayout")
        .def_static("make", &LowLatencyLayout::make, py::arg("shape"), py::arg("rail_idx") = 0)
        .def_property_readonly(
            "header_packets",
            [](const LowLatencyLayout& self) -> int32_t { return self.header_packets; })
        .def_readonly("row_stride", &LowLatencyLayout::row_stride)
        .def_readonly("slot_stride", &LowLatencyLayout::slot_stride)
        .def_readonly("total_bytes", &LowLatencyLayout::total_bytes)
        .def("header_offset", &LowLatencyLayout::header_offset, py::arg("slot"), py::arg("peer"))
        .def("row_offset", &LowLatencyLayout::row_offset, py::arg("slot"), py::arg("peer"),
             py::arg("token"))
        .def("credit_offset", &LowLatencyLayout::credit_offset, py::arg("slot"), py::arg("peer"))
        .def("mirror_offset", &LowLatencyLayout::mirror_offset, py::arg("slot"), py::arg("index"))
        .def("head_bytes", &LowLatencyLayout::head_bytes)
        .def("region_bytes", &LowLatencyLayout::region_bytes)
        .def("with_fp8_rows", &LowLatencyLayout::with_fp8_rows);
    py::class_<LowLatencyRecordLayout>(module, "LowLatencyRecordLayout")
        .def_static("make", &LowLatencyRecordLayout::make, py::arg("num_ranks"),
                    py::arg("max_tokens"), py::arg("num_topk"), py::arg("num_nodes"))
        .def_readonly("turn", &LowLatencyRecordLayout::turn)
        .def_readonly("entries", &LowLatencyRecordLayout::entries)
        .def_readonly("num_words", &LowLatencyRecordLayout::num_words);
    py::class_<WordOffsets>(module, "WordOffsets")
        .def(py::init([](int64_t counts, int64_t topk_idx, int64_t topk_weights,
                         int64_t out_topk_weights) {
                 return WordOffsets{counts, topk_idx, topk_weights, out_topk_weights};
             }),
             py::kw_only(), py::arg("counts"), py::arg("topk_idx"), py::arg("topk_weights"),
             py::arg("out_topk_weights"))
        .def_readonly("counts", &WordOffsets::counts)
        .def_readonly("topk_idx", &WordOffsets::topk_idx)
        .def_readonly("topk_weights", &WordOffsets::topk_weights)
        .def_readonly("out_topk_weights", &WordOffsets::out_topk_weights);
    module.def("low_latency_row_parts", &layout::row_parts, py::arg("hidden"));
    module.attr("MAX_LOW_LATENCY_RANKS") = layout::kMaxLowLatencyRanks;
    module.attr("MAX_LOW_LATENCY_EXPERTS") = layout::kMaxLowLatencyExperts;
    module.attr("MAX_LOW_LATENCY_TOKEN_WORDS") = layout::kMaxLowLatencyTokenWords;
    module.attr("MAX_LOW_LATENCY_HIDDEN") = layout::kMaxLowLatencyHidden;
    module.attr("LOW_LATENCY_STATE_BYTES") = sizeof(layout::LowLatencyState);
    module.attr("LOW_LATENCY_SEND_UNIT") = layout::kSendUnit;
    module.attr("LOW_LATENCY_STATUS_BYTES") = sizeof(layout::LowLatencyStatus);
}

void bind_base(py::module_& module) {
    py::class_<LowLatencyParams> base(module, "LowLatencyParams");
    base.def_readonly("comm", &LowLatencyParams::comm)
        .def_readwrite("map", &LowLatencyParams::map)
        .def_readwrite("record_map", &LowLatencyParams::record_map)
        .def_readwrite("signature", &LowLatencyParams::signature)
        .def_property(
            "num_topk", [](const LowLatencyParams& self) -> int32_t { return self.num_topk; },
            [](LowLatencyParams& self, int32_t num_topk) { self.num_topk = Divisor::of(num_topk); })
        .def_readwrite("num_tokens", &LowLatencyParams::num_tokens)
        .def_readwrite("mask_late", &LowLatencyParams::mask_late)
        .def_readwrite("node_idx", &LowLatencyParams::node_idx)
        .def_readwrite("rail_idx", &LowLatencyParams::rail_idx)
        .def(
            "set_timeouts",
            [](LowLatencyParams& self, const TimeoutsNs& timeouts_ns) {
                std::copy(timeouts_ns.begin(), timeouts_ns.end(), self.timeouts_ns);
            },
            py::arg("timeouts_ns"), "One a role of layout::Role.");
    def_address(base, "credit_bases", &LowLatencyParams::credit_bases);
    def_address(base, "local", &LowLatencyParams::local);
    def_address(base, "state", &LowLatencyParams::state);
    def_address(base, "turn", &LowLatencyParams::turn);
    def_address(base, "rank_mask", &LowLatencyParams::rank_mask);
    def_address(base, "decisions", &LowLatencyParams::decisions);
    def_address(base, "unread", &LowLatencyParams::unread);
    def_address(base, "late_ranks", &LowLatencyParams::late_ranks);
    def_address(base, "status", &LowLatencyParams::status);
    def_address(base, "wait_us", &LowLatencyParams::wait_us);
    def_address(base, "record", &LowLatencyParams::record);
}

/// A zeroed struct that a kernel takes, with the fields of all low-latency kernels inside.
template <typename Struct>
py::class_<Struct> operation_params(py::module_& module, const char* name) {
    auto params = kernel_params<Struct>(module, name);
    params.def_readonly("base", &Struct::base).def("copy", [](const Struct& self) { return self; });
    return params;
}

void set_dispatch_outputs(LowLatencyDispatchParams& params, TensorAddress x, TensorAddress scales,
                          TensorAddress topk_idx, TensorAddress words, const WordOffsets& offsets) {
    set_outputs(params, {x, scales, topk_idx, words}, offsets);
}

void set_combine_outputs(LowLatencyCombineParams& params, TensorAddress out, TensorAddress words,
                         const WordOffsets& offsets) {
    set_outputs(params, out, words, offsets);
}

/// What changes in every call is set by few calls, which take the tensors themselves: each call, and
/// each question for an address, costs as much as ten arguments.
void bind_dispatch_setters(py::class_<LowLatencyDispatchParams>& params) {
    params.def(
        "set_inputs",
        [](LowLatencyDispatchParams& self, TensorAddress x, TensorAddress scales,
           TensorAddress topk_idx, TensorAddress topk_weights) {
            set_inputs(self, {x.value, scales.value, topk_idx.value, topk_weights.value});
        },
        py::arg("x"), py::arg("scales"), py::arg("topk_idx"), py::arg("topk_weights"));
    def_method<&set_dispatch_outputs>(
        params, "set_outputs",
        "set_outputs(self, x: torch.Tensor | None, scales: torch.Tensor | None, topk_idx: "
        "torch.Tensor | None, words: torch.Tensor | None, offsets: WordOffsets, /) -> None\n\n"
        "The words are one allocation: the record of record_map, and at the offsets what else is "
        "filled. After set_inputs.");
}

void bind_dispatch(py::module_& module) {
    auto params = operation_params<LowLatencyDispatchParams>(module, "LowLatencyDispatchParams");
    params.def_readwrite("x_stride", &LowLatencyDispatchParams::x_stride)
        .def_readwrite("scale_stride", &LowLatencyDispatchParams::scale_stride)
        .def_readwrite("topk_idx_is_int64", &LowLatencyDispatchParams::topk_idx_is_int64)
        .def_readwrite("num_experts", &LowLatencyDispatchParams::num_experts)
        .def_readwrite("scale_block_stride", &LowLatencyDispatchParams::scale_block_stride)
        .def_readwrite("scale_row_stride", &LowLatencyDispatchParams::scale_row_stride)
        .def_readwrite("scale_word_stride", &LowLatencyDispatchParams::scale_word_stride)
        .def_readwrite("stats_is_int64", &LowLatencyDispatchParams::stats_is_int64)
        .def_readwrite("is_token_layout", &LowLatencyDispatchParams::is_token_layout)
        .def_readwrite("admits_next", &LowLatencyDispatchParams::admits_next);
    def_address(params, "x", &LowLatencyDispatchParams::x);
    def_address(params, "scales", &LowLatencyDispatchParams::scales);
    def_address(params, "topk_idx", &LowLatencyDispatchParams::topk_idx);
    def_address(params, "topk_weights", &LowLatencyDispatchParams::topk_weights);
    def_address(params, "handle_topk_idx", &LowLatencyDispatchParams::handle_topk_idx);
    def_address(params, "handle_topk_weights", &LowLatencyDispatchParams::handle_topk_weights);
    def_address(params, "out_x", &LowLatencyDispatchParams::out_x);
    def_address(params, "out_scales", &LowLatencyDispatchParams::out_scales);
    def_address(params, "out_topk_idx", &LowLatencyDispatchParams::out_topk_idx);
    def_address(params, "out_topk_weights", &LowLatencyDispatchParams::out_topk_weights);
    def_address(params, "counts", &LowLatencyDispatchParams::counts);
    def_address(params, "num_recv", &LowLatencyDispatchParams::num_recv);
    def_address(params, "expert_token_stats", &LowLatencyDispatchParams::expert_token_stats);
    bind_dispatch_setters(params);
}

void bind_combine(py::module_& module) {
    auto params = operation_params<LowLatencyCombineParams>(module, "LowLatencyCombineParams");
    params.def_readwrite("y_stride", &LowLatencyCombineParams::y_stride)
        .def_readwrite("bias_stride", &LowLatencyCombineParams::bias_stride)
        .def_readwrite("apply_weights", &LowLatencyCombineParams::apply_weights)
        .def_readwrite("is_token_layout", &LowLatencyCombineParams::is_token_layout);
    def_address(params, "y", &LowLatencyCombineParams::y);
    def_address(params, "topk_idx", &LowLatencyCombineParams::topk_idx);
    def_address(params, "source_weights", &LowLatencyCombineParams::source_weights);
    def_address(params, "carried", &LowLatencyCombineParams::carried);
    def_address(params, "out_topk_weights", &LowLatencyCombineParams::out_topk_weights);
    def_address(params, "bias", &LowLatencyCombineParams::bias);
    def_address(params, "out", &LowLatencyCombineParams::out);
    params.def(
        "set_inputs",
        [](LowLatencyCombineParams& self, TensorAddress y) { set_inputs(self, {y.value}); },
        py::arg("y"));
    def_method<&set_combine_outputs>(
        params, "set_outputs",
        "set_outputs(self, out: torch.Tensor | None, words: torch.Tensor | None, offsets: "
        "WordOffsets, /) -> None\n\nThe words are those of the dispatch.");
}

void bind_others(py::module_& module) {
    auto refuse = operation_params<LowLatencyRefuseParams>(module, "LowLatencyRefuseParams");
    refuse.def_readwrite("is_combine", &LowLatencyRefuseParams::is_combine)
        .def_property(
            "step",
            [](const LowLatencyRefuseParams& self) { return static_cast<int32_t>(self.step); },
            [](LowLatencyRefuseParams& self, int32_t value) {
                self.step = static_cast<kernels::RefuseStep>(value);
            })
        .def(
            "set_message",
            [](LowLatencyRefuseParams& self, std::string_view text) {
                std::memset(self.message, 0, sizeof self.message);
                std::memcpy(self.message, text.data(),
                            std::min(text.size(), sizeof self.message - 1));
            },
            py::arg("text"), "Keeps as much of it as travels.");
    auto mask = kernel_params<LowLatencyMaskParams>(module, "LowLatencyMaskParams");
    mask.def_readwrite("peer", &LowLatencyMaskParams::peer)
        .def_readwrite("value", &LowLatencyMaskParams::value);
    def_address(mask, "rank_mask", &LowLatencyMaskParams::rank_mask);
    auto mark = kernel_params<LowLatencyMarkParams>(module, "LowLatencyMarkParams");
    mark.def_readwrite("value", &LowLatencyMarkParams::value);
    def_address(mark, "word", &LowLatencyMarkParams::word);
}

}  // namespace

void bind_kernels_low_latency(py::module_& parent) {
    auto module = parent.attr("kernels").cast<py::module_>();
    bind_maps(module);
    bind_base(module);
    bind_dispatch(module);
    bind_combine(module);
    bind_others(module);
}

}  // namespace deepcomm
