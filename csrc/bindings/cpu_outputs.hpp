// SPDX-License-Identifier: Apache-2.0
// Tensors that a dispatch fills beside the rows and their scales, and those that its handle keeps,
// made in one call: made in Python they cost more than all that the native code does for one token.
#pragma once

#include <cstdint>
#include <optional>

#include "bindings/torch_tensor.hpp"
#include "cpu/dispatch.hpp"

namespace deepcomm {

struct OutputSizes {
    int64_t num_rows;  ///< of x, all blocks together
    int32_t num_local_experts;
    bool partly_filled;  ///< some rows of TOKEN hold no token
};

struct DispatchOutputs {
    std::optional<TorchTensor> topk_idx;
    std::optional<TorchTensor> topk_weights;
    TorchTensor counts;
    std::optional<TorchTensor> offsets;
    TorchTensor num_recv_tokens;
    TorchTensor overflow;
    cpu::DeliverTarget target;                  ///< the addresses of all these; none of rows yet
    std::optional<TorchTensor> routed_idx;      ///< copy of the ids; none for a cached dispatch
    std::optional<TorchTensor> routed_weights;  ///< copy of the weights, where given
};

DispatchOutputs make_outputs(const cpu::DispatchArgs& args, const cpu::Routing& routing,
                             const OutputSizes& sizes, bool ids_are_int64);

void bind_cpu_outputs(pybind11::module_& module);

}  // namespace deepcomm
