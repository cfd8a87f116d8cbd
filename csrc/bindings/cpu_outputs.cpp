// SPDX-License-Identifier: Apache-2.0
#include "bindings/cpu_outputs.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <new>
#include <numeric>
#include <vector>

#include "common/math.hpp"

namespace py = pybind11;

namespace deepcomm {
namespace {

using Shape = std::vector<int64_t>;

template <typename T>
constexpr DlDataType kElement{};
template <>
constexpr DlDataType kElement<int32_t> = kDlI32;
template <>
constexpr DlDataType kElement<int64_t> = kDlI64;
template <>
constexpr DlDataType kElement<float> = kDlF32;
template <>
constexpr DlDataType kElement<bool> = kDlBool;

/// A tensor of this shape, and where its elements are to be written.
template <typename T>
struct NewTensor {
    int64_t size;
    T* data;
    TorchTensor tensor;

    explicit NewTensor(Shape shape)
        : size(std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>())) {
        constexpr int64_t kAlign = 64;  // as torch's own
        const int64_t num_bytes = round_up(std::max(size, int64_t{1}) * sizeof(T), kAlign);
        void* const bytes = std::aligned_alloc(kAlign, static_cast<size_t>(num_bytes));
        if (bytes == nullptr) {
            throw std::bad_alloc();
        }
        data = static_cast<T*>(bytes);
        tensor =
            make_tensor({static_cast<std::byte*>(bytes), std::free}, kElement<T>, std::move(shape));
    }

    static NewTensor filled(Shape shape, T value) {
        NewTensor result(std::move(shape));
        std::fill_n(result.data, result.size, value);
        return result;
    }
    static NewTensor copied(Shape shape, const T* from) {
        NewTensor result(std::move(shape));
        std::copy_n(from, result.size, result.data);
        return result;
    }
};

template <typename Id>
void add_ids(const Shape& shape, bool partly_filled, DispatchOutputs& outputs) {
    auto ids = partly_filled ? NewTensor<Id>::filled(shape, -1) : NewTensor<Id>(shape);
    outputs.target.topk_idx = ids.data;
    outputs.topk_idx = std::move(ids.tensor);
}

void add_rows_metadata(const cpu::DispatchArgs& args, const OutputSizes& sizes,
                       DispatchOutputs& outputs) {
    const bool by_token = args.recv_layout == RecvLayout::kToken;
    Shape shape{sizes.num_rows};
    if (by_token) {
        shape = {sizes.num_rows, args.num_topk};
        (outputs.target.topk_idx_is_int64 ? add_ids<int64_t>
                                          : add_ids<int32_t>)(shape, sizes.partly_filled, outputs);
    } else if (args.recv_layout == RecvLayout::kExpertPadded) {
        shape = {sizes.num_local_experts, sizes.num_rows / sizes.num_local_experts};
    }
    if (args.topk_weights != nullptr) {
        auto weights = NewTensor<float>::filled(shape, 0.0F);
        outputs.target.topk_weights = weights.data;
        outputs.topk_weights = std::move(weights.tensor);
    }
}

void add_counts(const cpu::DispatchArgs& args, const OutputSizes& sizes, DispatchOutputs& outputs) {
    NewTensor<int32_t> counts({sizes.num_local_experts});
    outputs.target.counts = counts.data;
    outputs.counts = std::move(counts.tensor);
    if (args.recv_layout == RecvLayout::kExpert) {
        NewTensor<int32_t> offsets({sizes.num_local_experts + 1});
        outputs.target.offsets = offsets.data;
        outputs.offsets = std::move(offsets.tensor);
    }
    NewTensor<int32_t> num_recv_tokens({});
    outputs.target.num_recv_tokens = num_recv_tokens.data;
    outputs.num_recv_tokens = std::move(num_recv_tokens.tensor);
    NewTensor<bool> overflow({});
    outputs.target.overflow = overflow.data;
    outputs.overflow = std::move(overflow.tensor);
}

}  // namespace

DispatchOutputs make_outputs(const cpu::DispatchArgs& args, const cpu::Routing& routing,
                             const OutputSizes& sizes, bool ids_are_int64) {
    DispatchOutputs outputs;
    outputs.target.topk_idx_is_int64 = ids_are_int64;
    add_rows_metadata(args, sizes, outputs);
    add_counts(args, sizes, outputs);
    const Shape routed{args.num_tokens, args.num_topk};
    if (args.cached == nullptr) {
        outputs.routed_idx = NewTensor<int32_t>::copied(routed, routing.topk_idx.data()).tensor;
    }
    if (args.topk_weights != nullptr) {
        outputs.routed_weights = NewTensor<float>::copied(routed, args.topk_weights).tensor;
    }
    return outputs;
}

void bind_cpu_outputs(py::module_& module) {
    py::class_<DispatchOutputs>(module, "DispatchOutputs")
        .def_readonly("topk_idx", &DispatchOutputs::topk_idx)
        .def_readonly("topk_weights", &DispatchOutputs::topk_weights)
        .def_readonly("counts", &DispatchOutputs::counts)
        .def_readonly("offsets", &DispatchOutputs::offsets)
        .def_readonly("num_recv_tokens", &DispatchOutputs::num_recv_tokens)
        .def_readonly("overflow", &DispatchOutputs::overflow)
        .def_readonly("target", &DispatchOutputs::target)
        .def_readonly("routed_idx", &DispatchOutputs::routed_idx)
        .def_readonly("routed_weights", &DispatchOutputs::routed_weights);
}

}  // namespace deepcomm
