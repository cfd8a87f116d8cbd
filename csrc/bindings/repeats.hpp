// SPDX-License-Identifier: Apache-2.0
// Low-latency calls like earlier ones, from their arguments to their outputs. Python does the same for
// others, in steps each of which takes as long as all of this.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <optional>
#include <utility>

#include "bindings/low_latency_arguments.hpp"
#include "bindings/plans.hpp"
#include "host/turns.hpp"
#include "layout/error_record.hpp"
#include "layout/low_latency.hpp"

namespace deepcomm {

// ---- what is called

/// Fields of a request in their order, which is that of a call's arguments.
constexpr const char* kDispatchFields[] = {"x",
                                           "topk_idx",
                                           "topk_weights",
                                           "quantize",
                                           "scale_format",
                                           "recv_layout",
                                           "zero_padding",
                                           "out",
                                           "return_hook",
                                           "async_op",
                                           "previous_event",
                                           "on_timeout",
                                           "expert_token_stats",
                                           "wait_us_stats"};
struct DispatchField {
    enum : size_t {
        kX,
        kTopkIdx,
        kTopkWeights,
        kQuantize,
        kScaleFormat,
        kRecvLayout,
        kZeroPadding,
        kOut,
        kReturnHook,
        kAsyncOp,
        kPreviousEvent,
        kOnTimeout,
        kExpertTokenStats,
        kWaitUsStats,
        kCount
    };
};
static_assert(std::size(kDispatchFields) == DispatchField::kCount);

constexpr const char* kCombineFields[] = {
    "y",           "handle",   "topk_weights",   "apply_weights", "bias",         "out",
    "return_hook", "async_op", "previous_event", "on_timeout",    "wait_us_stats"};
struct CombineField {
    enum : size_t {
        kY,
        kHandle,
        kTopkWeights,
        kApplyWeights,
        kBias,
        kOut,
        kReturnHook,
        kAsyncOp,
        kPreviousEvent,
        kOnTimeout,
        kWaitUsStats,
        kCount
    };
};
static_assert(std::size(kCombineFields) == CombineField::kCount);

/// The arguments of one call, which lends them.
class Arguments {
  public:
    explicit Arguments(const pybind11::tuple& given) : given_(given) {}

    PyObject* operator[](size_t field) const { return PyTuple_GET_ITEM(given_.ptr(), field); }

    bool are_all(PyObject* value, std::initializer_list<size_t> fields) const {
        for (const size_t field : fields) {
            if ((*this)[field] != value) {
                return false;
            }
        }
        return true;
    }

    /// Others may raise an error when they are asked, of which peers have to hear.
    bool is_bool(size_t field) const { return PyBool_Check((*this)[field]) != 0; }

    size_t size() const { return given_.size(); }

  private:
    const pybind11::tuple& given_;
};

// ---- what repeats an operation

/// Part of its plan.
template <typename Params>
struct Repeat {
    pybind11::object owner;  ///< of the params
    Params* params;
    pybind11::function allocate;
    WordOffsets offsets;
    pybind11::object map;  ///< of a dispatch's words
    int64_t num_tokens;
    pybind11::object launch = pybind11::none();  ///< None: it was never launched
};

using DispatchRepeat = Repeat<kernels::LowLatencyDispatchParams>;
using CombineRepeat = Repeat<kernels::LowLatencyCombineParams>;

/// What makes the objects that a buffer's calls return.
struct Makers {
    pybind11::bytes buffer_id;  ///< the object that its records have
    pybind11::function record;
    pybind11::function handle;
    pybind11::function output;
    pybind11::function sums;
};

/// What calls ask of Python.
struct Callbacks {
    pybind11::function raise_earlier;
    std::optional<pybind11::function> push_range;  ///< none: nobody looks at ranges
    std::optional<pybind11::function> pop_range;
};

/// What a buffer keeps of its operations.
struct Kept {
    Plans& dispatches;
    Plans& combines;
    host::Turns& turns;
    host::OperationCounts& counts;
    const layout::LowLatencyStatus* status;
    const layout::ErrorRecord* failure;
    pybind11::tuple owners;
};

/// Attributes that are read in calls.
struct Names {
    pybind11::str repeat = interned("repeat");
    pybind11::str data = interned("data");
    pybind11::str scales = interned("scales");
    pybind11::str records = interned("records");
    pybind11::str buffer_id = interned("buffer_id");
    pybind11::str is_complete = interned("is_complete");
    pybind11::str map = interned("map");
    pybind11::str words = interned("words");
    pybind11::str dispatch_range = interned("deepcomm.low_latency_dispatch");
    pybind11::str combine_range = interned("deepcomm.low_latency_combine");

    static pybind11::str interned(const char* text) {
        return pybind11::reinterpret_steal<pybind11::str>(PyUnicode_InternFromString(text));
    }
};

/// Calls of one buffer. They return None, and have done nothing, where a call is not like an earlier one,
/// or where something is wrong that peers have to hear of.
class Repeats {
  public:
    Repeats(Kept kept, Makers makers, Callbacks callbacks)
        : kept_(std::move(kept)),
          makers_(std::move(makers)),
          callbacks_(std::move(callbacks)),
          scaled_tensor_(pybind11::module_::import("deepcomm.types").attr("ScaledTensor")) {}

    pybind11::object dispatch(const Arguments& given);
    pybind11::object combine(const Arguments& given);

  private:
    bool may_begin() const;
    pybind11::object find_dispatch(const Arguments& given);
    pybind11::object find_combine(const Arguments& given, const pybind11::object& record);
    pybind11::object record_of(pybind11::handle handle) const;
    template <typename Params>
    Repeat<Params>* repeat_of(const pybind11::object& plan) const;
    void launch(const pybind11::object& launch);

    Kept kept_;
    Makers makers_;
    Callbacks callbacks_;
    pybind11::object scaled_tensor_;
    Names names_;
};

}  // namespace deepcomm
