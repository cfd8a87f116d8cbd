// SPDX-License-Identifier: Apache-2.0
#include "bindings/repeats.hpp"

#include "bindings/native_function.hpp"
#include "host/shared_record.hpp"

namespace py = pybind11;

namespace deepcomm {

using kernels::LowLatencyCombineParams;
using kernels::LowLatencyDispatchParams;

namespace {

/// Tells profilers, if there are any, what the host does as long as this lives.
class Range {
  public:
    Range(const Callbacks& callbacks, const py::str& name) : callbacks_(callbacks) {
        if (callbacks.push_range) {
            call(*callbacks.push_range, name);
        }
    }
    ~Range() {
        if (!callbacks_.pop_range) {
            return;
        }
        PyObject* const result = PyObject_CallNoArgs(callbacks_.pop_range->ptr());
        if (result == nullptr) {
            PyErr_WriteUnraisable(callbacks_.pop_range->ptr());
        }
        Py_XDECREF(result);
    }
    Range(const Range&) = delete;
    Range& operator=(const Range&) = delete;

  private:
    const Callbacks& callbacks_;
};

/// Returns what a step gives, null where it raises an error: Python finds that again, and tells the peers.
template <typename Step>
py::object attempt(Step&& step) {
    try {
        return step();
    } catch (const py::error_already_set& error) {
        if (!error.matches(PyExc_Exception)) {
            throw;
        }
        return {};
    }
}

}  // namespace

/// Whether an operation may take the next turn: Python raises why not.
bool Repeats::may_begin() const {
    const bool has_failed = host::is_complete(&kept_.failure->state) ||
                            host::load_acquire(&kept_.failure->is_condemned) != 0;
    return !has_failed && kept_.turns.has_free_slot();
}

/// Returns how a plan is repeated; null: there is no plan, or it has never been launched as a whole.
template <typename Params>
Repeat<Params>* Repeats::repeat_of(const py::object& plan) const {
    if (!plan || plan.is_none()) {
        return nullptr;
    }
    auto& repeat = value_of<Repeat<Params>>(py::object(plan.attr(names_.repeat)));
    return repeat.launch.is_none() ? nullptr : &repeat;
}

py::object Repeats::find_dispatch(const Arguments& given) {
    using Field = DispatchField;
    const py::handle x = given[Field::kX];
    const bool is_scaled =
        Py_TYPE(x.ptr()) == reinterpret_cast<PyTypeObject*>(scaled_tensor_.ptr());
    const py::object rows =
        is_scaled ? py::object(x.attr(names_.data)) : py::reinterpret_borrow<py::object>(x);
    const py::object scales = is_scaled ? py::object(x.attr(names_.scales)) : py::none();
    PyObject* const inputs[] = {rows.ptr(), scales.ptr(), given[Field::kTopkIdx],
                                given[Field::kTopkWeights]};
    PyObject* const others[] = {Py_None, Py_None, Py_None};
    PyObject* const options[] = {is_scaled ? Py_True : Py_False, given[Field::kRecvLayout],
                                 given[Field::kQuantize],        given[Field::kScaleFormat],
                                 given[Field::kZeroPadding],     given[Field::kOnTimeout]};
    return kept_.dispatches.find({inputs, others, options});
}

py::object Repeats::dispatch(const Arguments& given) {
    using Field = DispatchField;
    const bool is_plain = given.size() == Field::kCount && given.is_bool(Field::kZeroPadding) &&
                          given.are_all(Py_None, {Field::kOut, Field::kPreviousEvent,
                                                  Field::kExpertTokenStats, Field::kWaitUsStats}) &&
                          given.are_all(Py_False, {Field::kReturnHook, Field::kAsyncOp});
    if (!is_plain || !may_begin()) {
        return py::none();
    }
    const py::object plan = attempt([&] { return find_dispatch(given); });
    auto* const repeat = repeat_of<LowLatencyDispatchParams>(plan);
    if (repeat == nullptr) {
        return py::none();
    }
    const Range range(callbacks_, names_.dispatch_range);
    const py::object tensors = attempt([&] { return call(repeat->allocate); });
    if (!tensors) {
        return py::none();
    }
    const auto outputs = py::reinterpret_borrow<py::tuple>(tensors);
    const py::object x = outputs[0];
    const py::object scales = outputs[1];
    const py::object topk_idx = outputs[2];
    const py::object words = outputs[3];
    set_outputs(
        *repeat->params,
        {{address_of(x)}, {address_of(scales)}, {address_of(topk_idx)}, {address_of(words)}},
        repeat->offsets);
    const py::object handle = call(makers_.handle, call(makers_.record, words, repeat->map));
    const py::object output = call(makers_.output, handle, x, scales, topk_idx);
    kept_.counts.num_dispatches += 1;
    kept_.counts.tokens_sent += repeat->num_tokens;
    launch(repeat->launch);
    return output;
}

py::object Repeats::find_combine(const Arguments& given, const py::object& record) {
    using Field = CombineField;
    const py::object map = record.attr(names_.map);
    PyObject* const inputs[] = {given[Field::kY], Py_None, Py_None};
    PyObject* const others[] = {Py_None, Py_None};
    PyObject* const options[] = {map.ptr(), given[Field::kApplyWeights], given[Field::kOnTimeout]};
    return kept_.combines.find({inputs, others, options});
}

/// Returns the record of a handle, null where combines of this buffer may not use it.
py::object Repeats::record_of(py::handle handle) const {
    py::object record = handle.attr(names_.records);
    const py::object buffer_id = record.attr(names_.buffer_id);
    const py::object is_complete = record.attr(names_.is_complete);
    return buffer_id.is(makers_.buffer_id) && is_complete.ptr() == Py_True ? record : py::object();
}

py::object Repeats::combine(const Arguments& given) {
    using Field = CombineField;
    const bool is_plain = given.size() == Field::kCount && given.is_bool(Field::kApplyWeights) &&
                          given.are_all(Py_None, {Field::kTopkWeights, Field::kBias, Field::kOut,
                                                  Field::kPreviousEvent, Field::kWaitUsStats}) &&
                          given.are_all(Py_False, {Field::kReturnHook, Field::kAsyncOp});
    if (!is_plain || !may_begin()) {
        return py::none();
    }
    const py::object record = attempt([&] { return record_of(given[Field::kHandle]); });
    const py::object plan =
        record ? attempt([&] { return find_combine(given, record); }) : py::none();
    auto* const repeat = repeat_of<LowLatencyCombineParams>(plan);
    if (repeat == nullptr) {
        return py::none();
    }
    const Range range(callbacks_, names_.combine_range);
    const py::object x = attempt([&] { return call(repeat->allocate); });
    if (!x) {
        return py::none();
    }
    const py::object words = record.attr(names_.words);
    set_outputs(*repeat->params, {address_of(x)}, {address_of(words)}, repeat->offsets);
    const py::object output = call(makers_.sums, x);
    kept_.counts.num_combines += 1;
    launch(repeat->launch);
    return output;
}

/// Raises what an earlier operation has left once this one has taken its turn, as all ranks do.
void Repeats::launch(const py::object& launch) {
    call(launch);
    kept_.turns.open();
    if (host::is_complete(&kept_.status->state)) {
        call(callbacks_.raise_earlier);
    }
}

}  // namespace deepcomm
