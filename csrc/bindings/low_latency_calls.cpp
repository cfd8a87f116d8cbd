// SPDX-License-Identifier: Apache-2.0
// deepcomm._C.kernels: what the host remembers of low-latency operations, and what repeats them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>

#include "bindings/bind.hpp"
#include "bindings/low_latency_arguments.hpp"
#include "bindings/native_function.hpp"
#include "bindings/plans.hpp"
#include "bindings/repeats.hpp"
#include "host/turns.hpp"

namespace py = pybind11;

namespace deepcomm {
namespace {

using host::OperationCounts;
using host::Turns;
using kernels::LowLatencyCombineParams;
using kernels::LowLatencyDispatchParams;

template <typename T>
py::object owner_of(T& value) {
    return py::cast(&value, py::return_value_policy::reference);
}

/// The params live as long as the plan is kept.
template <typename Params>
void keep_plan(Plans& plans, py::object plan, Params& params, const py::tuple& inputs,
               const py::tuple& others, const py::tuple& options) {
    const auto fill = [owner = owner_of(params), &params](const Plans::Addresses& found) {
        set_inputs(params, found);
    };
    plans.keep(std::move(plan), fill, {inputs, others, options});
}

AnyObject find_plan(Plans& plans, const py::tuple& inputs, const py::tuple& others,
                    const py::tuple& options) {
    return plans.find({inputs, others, options});
}

void bind_plans(py::module_& module) {
    module.def("can_describe_tensors", &can_describe_tensors,
               "Whether this torch has what describes a tensor by one call.");
    py::class_<Plans> plans(module, "LowLatencyPlans");
    plans.def(py::init<size_t>(), py::arg("most"))
        .def("__len__", &Plans::size)
        .def("keep", &keep_plan<LowLatencyDispatchParams>, py::arg("plan"), py::arg("params"),
             py::arg("inputs"), py::arg("others"), py::arg("options"),
             "Remember the plan of such a call, unless it has what is no tensor.")
        .def("keep", &keep_plan<LowLatencyCombineParams>, py::arg("plan"), py::arg("params"),
             py::arg("inputs"), py::arg("others"), py::arg("options"));
    def_method<&find_plan>(
        plans, "find",
        "find(self, inputs: tuple, others: tuple, options: tuple, /) -> typing.Any\n\n"
        "Return the plan that was kept for such a call, with the addresses of the inputs in its "
        "params; or None. Inputs and others are tensors or None.");
}

AnyObject repeat_dispatch(Repeats& repeats, const py::tuple& arguments) {
    return AnyObject(repeats.dispatch(Arguments(arguments)));
}

AnyObject repeat_combine(Repeats& repeats, const py::tuple& arguments) {
    return AnyObject(repeats.combine(Arguments(arguments)));
}

template <size_t kCount>
py::tuple tuple_of(const char* const (&names)[kCount]) {
    py::tuple made(kCount);
    for (size_t index = 0; index < kCount; ++index) {
        made[index] = names[index];
    }
    return made;
}

void bind_turns(py::module_& module) {
    py::class_<Turns>(module, "LowLatencyTurns")
        .def(py::init<int64_t>(), py::arg("num_slots"))
        .def_property_readonly("has_free_slot", &Turns::has_free_slot)
        .def_property_readonly("next_slot", &Turns::next_slot)
        .def_property_readonly("num_in_flight", &Turns::num_in_flight)
        .def("open", &Turns::open)
        .def("leave_in_flight", &Turns::leave_in_flight, py::arg("number"))
        .def("settle", &Turns::settle, py::arg("number"));
    py::class_<OperationCounts>(module, "OperationCounts")
        .def(py::init<>())
        .def_readwrite("num_dispatches", &OperationCounts::num_dispatches)
        .def_readwrite("num_combines", &OperationCounts::num_combines)
        .def_readwrite("tokens_sent", &OperationCounts::tokens_sent);
}

void bind_repeat(py::module_& module) {
    py::class_<DispatchRepeat>(module, "LowLatencyDispatchRepeat")
        .def(py::init([](LowLatencyDispatchParams& params, py::function allocate,
                         const WordOffsets& offsets, py::object map, int64_t num_tokens) {
                 return DispatchRepeat{owner_of(params), &params,        std::move(allocate),
                                       offsets,          std::move(map), num_tokens};
             }),
             py::kw_only(), py::arg("params"), py::arg("allocate"), py::arg("offsets"),
             py::arg("map"), py::arg("num_tokens"))
        .def_readwrite("launch", &DispatchRepeat::launch);
    py::class_<CombineRepeat>(module, "LowLatencyCombineRepeat")
        .def(py::init([](LowLatencyCombineParams& params, py::function allocate,
                         const WordOffsets& offsets) {
                 return CombineRepeat{owner_of(params), &params,    std::move(allocate),
                                      offsets,          py::none(), 0};
             }),
             py::kw_only(), py::arg("params"), py::arg("allocate"), py::arg("offsets"))
        .def_readwrite("launch", &CombineRepeat::launch);
}

void bind_repeats(py::module_& module) {
    py::class_<Makers>(module, "LowLatencyMakers")
        .def(py::init([](py::bytes buffer_id, py::function record, py::function handle,
                         py::function output, py::function sums) {
                 return Makers{std::move(buffer_id), std::move(record), std::move(handle),
                               std::move(output), std::move(sums)};
             }),
             py::kw_only(), py::arg("buffer_id"), py::arg("record"), py::arg("handle"),
             py::arg("output"), py::arg("sums"));
    py::class_<Callbacks>(module, "LowLatencyCallbacks")
        .def(py::init([](py::function raise_earlier, std::optional<py::function> push_range,
                         std::optional<py::function> pop_range) {
                 return Callbacks{std::move(raise_earlier), std::move(push_range),
                                  std::move(pop_range)};
             }),
             py::kw_only(), py::arg("raise_earlier"), py::arg("push_range"), py::arg("pop_range"));
    py::class_<Kept>(module, "LowLatencyKept")
        .def(py::init([](Plans& dispatches, Plans& combines, Turns& turns, OperationCounts& counts,
                         uintptr_t status, uintptr_t failure, py::tuple owners) {
                 return Kept{dispatches,
                             combines,
                             turns,
                             counts,
                             pointer<const layout::LowLatencyStatus>(status),
                             pointer<const layout::ErrorRecord>(failure),
                             py::make_tuple(owner_of(dispatches), owner_of(combines),
                                            owner_of(turns), owner_of(counts), std::move(owners))};
             }),
             py::kw_only(), py::arg("dispatches"), py::arg("combines"), py::arg("turns"),
             py::arg("counts"), py::arg("status"), py::arg("failure"), py::arg("owners"),
             "The last are those of the two addresses.");
    py::class_<Repeats> repeats(module, "LowLatencyRepeats");
    repeats.def(py::init<Kept, Makers, Callbacks>(), py::kw_only(), py::arg("kept"),
                py::arg("makers"), py::arg("callbacks"));
    def_method<&repeat_dispatch>(
        repeats, "dispatch",
        "dispatch(self, arguments: tuple, /) -> typing.Any\n\n"
        "Return the output of a call with these arguments, in the order of DISPATCH_FIELDS; or "
        "None, having done nothing, where it is not like an earlier one.");
    def_method<&repeat_combine>(repeats, "combine",
                                "combine(self, arguments: tuple, /) -> typing.Any\n\n"
                                "Likewise, in the order of COMBINE_FIELDS.");
    module.attr("DISPATCH_FIELDS") = tuple_of(kDispatchFields);
    module.attr("COMBINE_FIELDS") = tuple_of(kCombineFields);
}

}  // namespace

void bind_low_latency_calls(py::module_& parent) {
    auto module = parent.attr("kernels").cast<py::module_>();
    bind_plans(module);
    bind_turns(module);
    bind_repeat(module);
    bind_repeats(module);
}

}  // namespace deepcomm
