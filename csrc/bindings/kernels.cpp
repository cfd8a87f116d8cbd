// SPDX-License-Identifier: Apache-2.0
// deepcomm._C.kernels: the kernels' arguments, which Python fills, and the maps of their memory.
#include <pybind11/pybind11.h>

#include "bindings/address.hpp"
#include "bindings/bind.hpp"
#include "kernels/combine/params.hpp"
#include "kernels/dispatch/params.hpp"
#include "kernels/gin/params.hpp"
#include "kernels/rail/params.hpp"
#include "layout/plan.hpp"

namespace py = pybind11;

namespace deepcomm {
namespace {

using kernels::CombineOpenParams;
using kernels::CombineParams;
using kernels::CombineTarget;
using kernels::CommParams;
using kernels::CountParams;
using kernels::ExpertOutputs;
using kernels::ExpertTarget;
using kernels::GinParams;
using kernels::Header;
using kernels::MeetParams;
using kernels::RailParams;
using kernels::RailSide;
using kernels::RailTarget;
using kernels::RoutingTable;
using kernels::RowSource;
using kernels::ScaleParams;
using kernels::SendParams;
using layout::ExchangeLayout;
using layout::ExchangeShape;
using layout::LandingOffsets;
using layout::RailReport;
using layout::RailWords;
using layout::RowAreas;

void bind_layout(py::module_& module) {
    py::class_<ExchangeShape>(module, "ExchangeShape")
        .def(py::init<>())
        .def_readwrite("num_ranks", &ExchangeShape::num_ranks)
        .def_readwrite("num_experts", &ExchangeShape::num_experts)
        .def_readwrite("num_topk", &ExchangeShape::num_topk)
        .def_readwrite("hidden", &ExchangeShape::hidden)
        .def_readwrite("max_tokens", &ExchangeShape::max_tokens)
        .def_readwrite("num_generations", &ExchangeShape::num_generations)
        .def_readwrite("num_origins", &ExchangeShape::num_origins)
        .def_property_readonly("num_counters", &ExchangeShape::num_counters)
        .def_property_readonly("max_rows", &ExchangeShape::max_rows);
    py::class_<LandingOffsets>(module, "LandingOffsets")
        .def_readonly("rows", &LandingOffsets::rows)
        .def_readonly("scales", &LandingOffsets::scales)
        .def_readonly("topk_idx", &LandingOffsets::topk_idx)
        .def_readonly("topk_weights", &LandingOffsets::topk_weights);
    py::class_<RowAreas>(module, "RowAreas")
        .def_readonly("landing", &RowAreas::landing)
        .def_readonly("combine_rows", &RowAreas::combine_rows)
        .def_readonly("combine_weights", &RowAreas::combine_weights)
        .def("generation", &RowAreas::generation, py::arg("index"));
    py::class_<ExchangeLayout>(module, "ExchangeLayout")
        .def_static("make", &ExchangeLayout::make, py::arg("shape"))
        .def_static("make_mirror", &ExchangeLayout::make_mirror, py::arg("shape"))
        .def_readonly("areas", &ExchangeLayout::areas)
        .def_readonly("shape", &ExchangeLayout::shape)
        .def_readonly("total_bytes", &ExchangeLayout::total_bytes);
    module.def(
        "plan_words",
        [](int32_t num_ranks, int32_t num_origins) {
            return layout::PlanLayout{num_ranks, num_origins}.num_words();
        },
        py::arg("num_ranks"), py::arg("num_origins"), "32-bit words of a handle's plan.");
    module.attr("VERDICT_BYTES") = sizeof(kernels::Verdict);
}

void bind_rail(py::module_& module) {
    module.attr("RAIL_STATE_BYTES") = sizeof(kernels::RailState);
    py::class_<RailWords>(module, "RailWords")
        .def(py::init([](int32_t num_counters) { return RailWords{num_counters}; }),
             py::arg("num_counters"))
        .def_property_readonly("num_bytes", &RailWords::num_bytes);
    py::class_<RailReport>(module, "RailReport")
        .def(py::init([](int32_t num_ranks) { return RailReport{num_ranks}; }),
             py::arg("num_ranks"))
        .def_property_readonly("is_good", &RailReport::is_good)
        .def_property_readonly("rows_to", &RailReport::rows_to)
        .def_property_readonly("rows_from", &RailReport::rows_from)
        .def_property_readonly("ids_are_64", &RailReport::ids_are_64)
        .def_property_readonly("num_bytes", &RailReport::num_bytes);
    auto rail = kernel_params<RailParams>(module, "RailParams");
    rail.def(
            "on_rail",
            [](RailParams& self, const MeetParams& rail) {
                self.comm = rail.comm;
                self.layout = rail.layout;
                self.max_tokens = rail.max_tokens;
            },
            py::arg("rail"), "Name the rail.")
        .def_readwrite("epoch", &RailParams::epoch)
        .def_readwrite("number", &RailParams::number)
        .def_property(
            "step", [](const RailParams& self) { return static_cast<int32_t>(self.step); },
            [](RailParams& self, int32_t value) {
                self.step = static_cast<kernels::RailStep>(value);
            })
        .def_readwrite("has_counts", &RailParams::has_counts)
        .def_readwrite("begin_row", &RailParams::begin_row)
        .def_readwrite("end_row", &RailParams::end_row);
    def_address(rail, "verdict", &RailParams::verdict);
    def_address(rail, "outbox", &RailParams::outbox);
    def_address(rail, "inbox", &RailParams::inbox);
    def_address(rail, "state", &RailParams::state);
    def_address(rail, "report", &RailParams::report);
    def_address(rail, "progress", &RailParams::progress);
    def_address(rail, "plan", &RailParams::plan);
    def_address(rail, "landed", &RailParams::landed);
}

void bind_gin(py::module_& module) {
    module.attr("GIN_MOST_SPANS") = layout::kMostGinSpans;
    module.attr("GIN_MOST_WINDOWS") = layout::kMostGinWindows;
    module.attr("GIN_PUT_BYTES") = layout::kGinPutBytes;
    module.attr("GIN_PEER_BYTES") = sizeof(layout::GinPeer);
    module.def(
        "gin_control_bytes",
        [](int32_t num_ranks) { return layout::GinControl{num_ranks}.num_bytes(); },
        py::arg("num_ranks"), "Of the words with which ranks tell each other where bytes go.");
    auto gin = kernel_params<GinParams>(module, "GinParams");
    gin.def(
           "set_comm",
           [](GinParams& self, int32_t rank, int32_t num_ranks, uint64_t timeout_ns,
              uintptr_t record, uintptr_t failed) {
               self.comm.rank = rank;
               self.comm.num_ranks = num_ranks;
               self.comm.timeout_ns = timeout_ns;
               self.comm.record = pointer<layout::ErrorRecord>(record);
               self.comm.failed = pointer<uint64_t>(failed);
           },
           py::arg("rank"), py::arg("num_ranks"), py::arg("timeout_ns"), py::arg("record"),
           py::arg("failed"), "Say who moves, and how that fails.")
        .def_property_readonly("timeout_ns",
                               [](const GinParams& self) { return self.comm.timeout_ns; })
        .def_property_readonly(
            "record",
            [](const GinParams& self) { return reinterpret_cast<uintptr_t>(self.comm.record); })
        .def_readwrite("num_peers", &GinParams::num_peers)
        .def_readwrite("number", &GinParams::number)
        .def_property(
            "windows",
            [](const GinParams& self) { return reinterpret_cast<uintptr_t>(self.windows); },
            [](GinParams& self, uintptr_t value) {
                self.windows = pointer<const void* const>(value);
            });
    def_address(gin, "dev_comm", &GinParams::dev_comm);
    def_address(gin, "control", &GinParams::control);
    def_address(gin, "peers", &GinParams::peers);
    def_address(gin, "done", &GinParams::done);
}

void bind_meet(py::module_& module) {
    py::class_<CommParams> comm(module, "CommParams");
    comm.def_readwrite("rank", &CommParams::rank)
        .def_readwrite("num_ranks", &CommParams::num_ranks)
        .def_readwrite("timeout_ns", &CommParams::timeout_ns);
    def_address(comm, "record", &CommParams::record);
    def_address(comm, "failed", &CommParams::failed);
    comm.def_property(
        "bases", [](const CommParams& self) { return reinterpret_cast<uintptr_t>(self.bases); },
        [](CommParams& self, uintptr_t value) {
            self.bases = pointer<unsigned char* const>(value);
        });
    py::class_<Header>(module, "Header")
        .def(py::init([](uint32_t signature, int32_t capacity, int32_t num_tokens, uint32_t landing,
                         int32_t alignment, uint32_t refusal) {
                 return Header{signature, capacity, num_tokens, landing, alignment, refusal};
             }),
             py::arg("signature"), py::arg("capacity"), py::arg("num_tokens"), py::arg("landing"),
             py::arg("alignment"), py::arg("refusal"));
    py::class_<MeetParams> meet(module, "MeetParams");
    meet.def(py::init([] { return MeetParams{}; }))
        .def_readonly("comm", &MeetParams::comm)
        .def_readwrite("layout", &MeetParams::layout)
        .def_readwrite("there", &MeetParams::there)
        .def_readwrite("is_carried", &MeetParams::is_carried)
        .def_readwrite("header", &MeetParams::header)
        .def_readwrite("max_tokens", &MeetParams::max_tokens)
        .def_readwrite("host_waits", &MeetParams::host_waits)
        .def_readwrite("reports", &MeetParams::reports)
        .def(
            "name_ranks",
            [](MeetParams& self, int32_t first, int32_t step) { self.comm.names = {first, step}; },
            py::arg("first"), py::arg("step"), "Say what these ranks are called among all.");
    def_address(meet, "epoch", &MeetParams::epoch);
    def_address(meet, "verdict", &MeetParams::verdict);
    def_address(meet, "verdict_before", &MeetParams::verdict_before);
    def_address(meet, "trouble", &MeetParams::trouble);
    def_address(meet, "has_trouble", &MeetParams::has_trouble);
    def_address(meet, "taken", &MeetParams::taken);
    def_address(meet, "counters", &MeetParams::counters);
    def_address(meet, "taken", &MeetParams::taken);
    py::class_<RoutingTable> table(module, "RoutingTable");
    table.def(py::init([] { return RoutingTable{}; }));
    def_address(table, "topk_idx", &RoutingTable::topk_idx);
    def_address(table, "token_slot", &RoutingTable::token_slot);
    def_address(table, "pair_slot", &RoutingTable::pair_slot);
    def_address(table, "plan", &RoutingTable::plan);
    def_address(table, "topk_weights", &RoutingTable::topk_weights);
}

void bind_count(py::module_& module) {
    auto count = kernel_params<CountParams>(module, "CountParams");
    count.def_readwrite("meet", &CountParams::meet)
        .def_readwrite("table", &CountParams::table)
        .def_readwrite("ids_are_64", &CountParams::ids_are_64)
        .def_readwrite("num_tokens", &CountParams::num_tokens)
        .def_readwrite("num_topk", &CountParams::num_topk)
        .def_property(
            "recv_layout",
            [](const CountParams& self) { return static_cast<int32_t>(self.recv_layout); },
            [](CountParams& self, int32_t value) {
                self.recv_layout = static_cast<RecvLayout>(value);
            })
        .def_readwrite("report_tag", &CountParams::report_tag);
    def_address(count, "topk_idx", &CountParams::topk_idx);
    def_address(count, "tokens_from", &CountParams::tokens_from);
    def_address(count, "partials", &CountParams::partials);
    def_address(count, "counts", &CountParams::counts);
    def_address(count, "offsets", &CountParams::offsets);
    def_address(count, "num_recv", &CountParams::num_recv);
    def_address(count, "overflow", &CountParams::overflow);
    def_address(count, "lost", &CountParams::lost);
    def_address(count, "report", &CountParams::report);
}

void bind_send(py::module_& module) {
    py::class_<RowSource> source(module, "RowSource");
    source.def_readwrite("row_stride", &RowSource::row_stride)
        .def_readwrite("scale_stride", &RowSource::scale_stride);
    def_address(source, "rows", &RowSource::rows);
    def_address(source, "scales", &RowSource::scales);
    py::class_<ExpertTarget> target(module, "ExpertTarget");
    def_address(target, "rows", &ExpertTarget::rows);
    def_address(target, "scales", &ExpertTarget::scales);
    def_address(target, "topk_weights", &ExpertTarget::topk_weights);
    def_address(target, "row_slots", &ExpertTarget::row_slots);
    def_address(target, "row_weights", &ExpertTarget::row_weights);
    py::class_<RailSide> rail(module, "RailSide");
    rail.def(
            "on_rail",
            [](RailSide& self, const MeetParams& rail) {
                self.comm = rail.comm;
                self.layout = rail.layout;
            },
            py::arg("rail"), "Name the rail.")
        .def_readwrite("part_rows", &RailSide::part_rows);
    def_address(rail, "lost", &RailSide::lost);
    def_address(rail, "overflow", &RailSide::overflow);
    def_address(rail, "landed", &RailSide::landed);
    auto send = kernel_params<SendParams>(module, "SendParams");
    send.def_readwrite("meet", &SendParams::meet)
        .def_readwrite("table", &SendParams::table)
        .def_readonly("rail", &SendParams::rail)
        .def_readonly("source", &SendParams::source)
        .def_readonly("target", &SendParams::target)
        .def_readwrite("num_origins", &SendParams::num_origins)
        .def_readwrite("num_tokens", &SendParams::num_tokens)
        .def_readwrite("num_topk", &SendParams::num_topk)
        .def_readwrite("opens", &SendParams::opens)
        .def_readwrite("zero_padding", &SendParams::zero_padding)
        .def_readwrite("scale_words", &SendParams::scale_words)
        .def_readwrite("scales_are_ue8m0", &SendParams::scales_are_ue8m0);
    def_address(send, "topk_weights", &SendParams::topk_weights);
    def_address(send, "round", &SendParams::round);
    def_address(send, "counts", &SendParams::counts);
    auto scales = kernel_params<ScaleParams>(module, "ScaleParams");
    scales.def_readwrite("num_blocks", &ScaleParams::num_blocks)
        .def_readwrite("block_rows", &ScaleParams::block_rows)
        .def_readwrite("column_words", &ScaleParams::column_words)
        .def_readwrite("scale_words", &ScaleParams::scale_words);
    def_address(scales, "rows", &ScaleParams::rows);
    def_address(scales, "columns", &ScaleParams::columns);
    def_address(scales, "used_rows", &ScaleParams::used_rows);
}

void bind_combine(py::module_& module) {
    py::class_<ExpertOutputs> outputs(module, "ExpertOutputs");
    outputs.def_readwrite("row_stride", &ExpertOutputs::row_stride);
    def_address(outputs, "rows", &ExpertOutputs::rows);
    def_address(outputs, "own_sums", &ExpertOutputs::own_sums);
    def_address(outputs, "row_slots", &ExpertOutputs::row_slots);
    def_address(outputs, "row_weights", &ExpertOutputs::row_weights);
    def_address(outputs, "carried", &ExpertOutputs::carried);
    py::class_<CombineTarget> target(module, "CombineTarget");
    target.def_readwrite("bias_stride", &CombineTarget::bias_stride);
    def_address(target, "out", &CombineTarget::out);
    def_address(target, "own_sums", &CombineTarget::own_sums);
    def_address(target, "bias", &CombineTarget::bias);
    def_address(target, "topk_weights", &CombineTarget::topk_weights);
    py::class_<RailTarget> rail(module, "RailTarget");
    rail.def(
        "on_rail",
        [](RailTarget& self, const MeetParams& meet) {
            self.comm = meet.comm;
            self.layout = meet.layout;
            self.there = meet.there;
            self.counters = meet.counters;
        },
        py::arg("rail"), "Name the rail.");
    def_address(rail, "plan", &RailTarget::plan);
    auto open = kernel_params<CombineOpenParams>(module, "CombineOpenParams");
    open.def_readwrite("meet", &CombineOpenParams::meet)
        .def_readwrite("num_tokens", &CombineOpenParams::num_tokens);
    def_address(open, "rail_made", &CombineOpenParams::rail_made);
    def_address(open, "node_made", &CombineOpenParams::node_made);
    auto combine = kernel_params<CombineParams>(module, "CombineParams");
    combine.def_readwrite("meet", &CombineParams::meet)
        .def_readwrite("table", &CombineParams::table)
        .def_readonly("outputs", &CombineParams::outputs)
        .def_readonly("target", &CombineParams::target)
        .def_readonly("rail", &CombineParams::rail)
        .def_readwrite("num_tokens", &CombineParams::num_tokens)
        .def_readwrite("num_topk", &CombineParams::num_topk);
    def_address(combine, "topk_weights", &CombineParams::topk_weights);
}

}  // namespace

void bind_kernels(py::module_& parent) {
    py::module_ module = parent.def_submodule("kernels", "Arguments of the CUDA kernels.");
    bind_layout(module);
    bind_meet(module);
    bind_count(module);
    bind_send(module);
    bind_combine(module);
    bind_rail(module);
    bind_gin(module);
}

}  // namespace deepcomm
