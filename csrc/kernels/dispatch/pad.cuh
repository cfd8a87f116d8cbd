// SPDX-License-Identifier: Apache-2.0
// TOKEN rows of a capacity that hold no token: ids -1 and weights 0, rows zero on request. Peers
// write only the rows before them. And counts of what was delivered where rows were lost.
#pragma once

#include "kernels/dispatch/deliver.cuh"

namespace deepcomm::kernels {

/// Rows of this rank that hold tokens.
template <typename Spec>
DEEPCOMM_DEVICE int32_t rows_here(const SendBlock<Spec>& my) {
    const layout::PlanLayout words = my.words();
    const int32_t num_rows = my.params.table.plan[words.rows_from() + words.num_blocks()];
    const int32_t limit = Spec::kByExpert ? kNoLimit : my.here().limit;
    return num_rows < limit ? num_rows : limit;
}

template <typename Spec>
DEEPCOMM_DEVICE void zero_row(const SendBlock<Spec>& my, int64_t row) {
    auto* vectors = at<device::Vec128>(my.here().rows, row * Spec::kRowBytes);
    for (int32_t i = my.warp.thread_idx(); i < Spec::kRowBytes / 16; i += my.warp.size()) {
        vectors[i] = device::Vec128{};
    }
    auto* scales = at<uint32_t>(my.here().scales, row * my.scale_bytes());
    for (int32_t i = my.warp.thread_idx(); i < my.params.scale_words; i += my.warp.size()) {
        scales[i] = 0;
    }
}

/// By all warps; a capacity beyond the landing area is not filled here.
template <typename Spec>
DEEPCOMM_DEVICE void pad_rows(const SendBlock<Spec>& my) {
    const Header& mine = my.smem.meet.headers[my.rank()];
    if (Spec::kByExpert || mine.capacity == kNoCapacity) return;
    const int64_t room = my.params.meet.layout.shape.max_rows();
    const int64_t end = mine.capacity < room ? mine.capacity : room;
    const Destination& here = my.here();
    const int32_t num_topk = my.params.num_topk;
    for (int64_t row = rows_here(my) + my.any_worker(); row < end; row += my.num_any_workers()) {
        for (int32_t k = my.warp.thread_idx(); k < num_topk; k += my.warp.size()) {
            const int64_t index = row * num_topk + k;
            if (here.ids_are_64) {
                static_cast<int64_t*>(here.topk_idx)[index] = -1;
            } else {
                static_cast<int32_t*>(here.topk_idx)[index] = -1;
            }
            here.topk_weights[index] = 0;
        }
        if (my.params.zero_padding) zero_row(my, row);
    }
}

/// By one block after all arrivals: counts the pairs again if TOKEN rows were lost here.
template <typename Spec>
DEEPCOMM_DEVICE void correct_counts(const SendBlock<Spec>& my) {
    const layout::PlanLayout words = my.words();
    const int32_t num_rows = rows_here(my);
    if (Spec::kByExpert || my.params.counts == nullptr) return;
    if (num_rows == my.params.table.plan[words.rows_from() + words.num_blocks()]) return;
    const Destination& here = my.here();
    for (int32_t e = my.block.thread_idx(); e < my.num_local(); e += my.block.size()) {
        int32_t count = 0;
        for (int64_t i = 0; i < static_cast<int64_t>(num_rows) * my.params.num_topk; ++i) {
            const int64_t id = here.ids_are_64 ? static_cast<const int64_t*>(here.topk_idx)[i]
                                               : static_cast<const int32_t*>(here.topk_idx)[i];
            count += id == e;
        }
        my.params.counts[e] = count;
    }
}

}  // namespace deepcomm::kernels
