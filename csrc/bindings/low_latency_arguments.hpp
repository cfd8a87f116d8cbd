// SPDX-License-Identifier: Apache-2.0
// Where the tensors of an operation go in the arguments of its kernels: what differs between calls alike.
#pragma once

#include <cstdint>

#include "bindings/address.hpp"
#include "bindings/plans.hpp"
#include "bindings/torch_tensor.hpp"
#include "kernels/low_latency/params.hpp"

namespace deepcomm {

/// Where the parts of a dispatch's one allocation lie, in 32-bit words; its record is at 0.
struct WordOffsets {
    int64_t counts;
    int64_t topk_idx;
    int64_t topk_weights;
    int64_t out_topk_weights;
};

struct DispatchOutputs {
    TensorAddress x;
    TensorAddress scales;
    TensorAddress topk_idx;
    TensorAddress words;  ///< record_map's record, and at the offsets what else is filled
};

inline void set_inputs(kernels::LowLatencyDispatchParams& params, const Plans::Addresses& inputs) {
    const auto [x, scales, topk_idx, topk_weights] = inputs;
    params.x = pointer<unsigned char>(x);
    params.scales = pointer<uint32_t>(scales);
    params.topk_idx = pointer<void>(topk_idx);
    params.topk_weights = pointer<float>(topk_weights);
}

inline void set_inputs(kernels::LowLatencyCombineParams& params, const Plans::Addresses& inputs) {
    params.y = pointer<unsigned char>(inputs[0]);
}

/// After set_inputs.
inline void set_outputs(kernels::LowLatencyDispatchParams& params, const DispatchOutputs& outputs,
                        const WordOffsets& offsets) {
    auto* const begin = pointer<int32_t>(outputs.words.value);
    auto* const floats = pointer<float>(outputs.words.value);
    const bool has_weights = params.topk_weights != nullptr;
    params.out_x = pointer<unsigned char>(outputs.x.value);
    params.out_scales = pointer<uint32_t>(outputs.scales.value);
    params.out_topk_idx = pointer<void>(outputs.topk_idx.value);
    params.base.record = begin;
    params.base.turn =
        reinterpret_cast<layout::LowLatencyTurn*>(begin + params.base.record_map.turn);
    params.counts = begin + offsets.counts;
    params.num_recv = params.counts + params.base.map.num_local_experts;
    params.handle_topk_idx = begin + offsets.topk_idx;
    params.handle_topk_weights = has_weights ? floats + offsets.topk_weights : nullptr;
    params.out_topk_weights = has_weights ? floats + offsets.out_topk_weights : nullptr;
}

/// The words are those of the dispatch.
inline void set_outputs(kernels::LowLatencyCombineParams& params, TensorAddress out,
                        TensorAddress words, const WordOffsets& offsets) {
    params.out = pointer<unsigned char>(out.value);
    params.base.record = pointer<int32_t>(words.value);
    params.topk_idx = params.base.record + offsets.topk_idx;
}

}  // namespace deepcomm
