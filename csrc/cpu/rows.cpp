// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows.hpp"

#include <algorithm>
#include <cstring>

#include "common/math.hpp"

namespace deepcomm::cpu {

RowFormat RowFormat::make(DType dtype, ScaleFormat scale_format, int32_t hidden) {
    RowFormat format;
    format.dtype = dtype;
    format.scale_format = scale_format;
    format.hidden = hidden;
    format.row_bytes = hidden * dtype_bytes(dtype);
    const int64_t tiles = ceil_div(hidden, kScaleTile);
    if (scale_format == ScaleFormat::kFp32) {
        format.scale_bytes = tiles * 4;
    } else if (scale_format == ScaleFormat::kUe8m0) {
        format.scale_bytes = round_up(tiles, 4);
    }
    return format;
}

RowReader::RowReader(const RowInput& input, const RowFormat& format, const RowOps& ops)
    : input_(input), format_(format), ops_(ops) {
    if (input.quantize) {
        row_.resize(static_cast<size_t>(format.row_bytes));
        scales_.resize(static_cast<size_t>(format.scale_bytes));
    }
}

RowView RowReader::read(int64_t token, const CastCopies& copies) {
    const std::byte* const row = input_.rows + token * input_.row_stride;
    if (!input_.quantize) {
        return {row,
                input_.scales == nullptr ? nullptr : input_.scales + token * input_.scale_stride};
    }
    auto* const data = reinterpret_cast<uint8_t*>(row_.data());
    if (format_.scale_format == ScaleFormat::kFp32) {
        ops_.cast_fp8(data, reinterpret_cast<float*>(scales_.data()), row, input_.dtype,
                      format_.hidden, copies);
    } else {
        ops_.cast_fp8_ue8m0(data, reinterpret_cast<uint8_t*>(scales_.data()), row, input_.dtype,
                            format_.hidden, copies);
    }
    return {row_.data(), scales_.data()};
}

void pack_record(const layout::TokenRecord& format, const PackedToken& token, std::byte* record) {
    const auto ids_bytes = static_cast<size_t>(token.num_topk) * sizeof(int32_t);
    std::memcpy(record, token.view.row, static_cast<size_t>(format.row_bytes));
    if (format.scale_bytes > 0) {
        std::memcpy(record + format.scales_offset, token.view.scales,
                    static_cast<size_t>(format.scale_bytes));
    }
    std::memcpy(record + format.topk_idx_offset, token.topk_idx, ids_bytes);
    if (token.topk_weights != nullptr) {
        std::memcpy(record + format.topk_weights_offset, token.topk_weights, ids_bytes);
    }
}

namespace {

/// The local experts of one received row, ascending: (expert, column).
int32_t sorted_experts(const int32_t* ids, int32_t num_topk, std::pair<int32_t, int32_t>* found) {
    int32_t count = 0;
    for (int32_t column = 0; column < num_topk; ++column) {
        if (ids[column] >= 0) {
            found[count++] = {ids[column], column};
        }
    }
    std::sort(found, found + count);
    return count;
}

void count_token_rows(int64_t capacity, int64_t total_rows, Received& received) {
    received.lost_here = capacity >= 0 && total_rows > capacity;
    received.out_rows = capacity >= 0 ? capacity : total_rows;
    received.num_recv = received.num_rows;
    for (const int32_t id : received.topk_idx) {
        if (id >= 0) {
            ++received.counts[static_cast<size_t>(id)];
        }
    }
}

void clip_offsets(int64_t capacity, const std::vector<int32_t>& full_offsets, Received& received) {
    const int64_t end = full_offsets.back();
    received.out_rows = capacity >= 0 ? capacity : end;
    received.num_recv = std::min(received.out_rows, end);
    received.offsets = full_offsets;
    for (int32_t& offset : received.offsets) {
        offset = static_cast<int32_t>(std::min<int64_t>(offset, received.out_rows));
    }
}

}  // namespace

void place_rows(const EndpointConfig& config, RecvLayout recv_layout, int64_t capacity,
                const std::vector<int32_t>& full_offsets, Received& received) {
    received.counts.assign(static_cast<size_t>(config.num_local_experts()), 0);
    if (recv_layout == RecvLayout::kToken) {
        count_token_rows(capacity, received.first_row.back(), received);
        return;
    }
    const bool padded = recv_layout == RecvLayout::kExpertPadded;
    received.block_rows = padded ? config.shape().max_rows() : 0;
    if (padded) {
        received.out_rows = received.block_rows * config.num_local_experts();
    } else {
        clip_offsets(capacity, full_offsets, received);
    }
    std::vector<int32_t> next(received.counts.size(), 0);
    std::pair<int32_t, int32_t> found[kMaxTopk];
    received.first_expert_row.push_back(0);
    for (int32_t row = 0; row < received.num_rows; ++row) {
        const int32_t* const ids =
            received.topk_idx.data() + static_cast<int64_t>(row) * received.num_topk;
        const int32_t count = sorted_experts(ids, received.num_topk, found);
        for (int32_t index = 0; index < count; ++index) {
            const auto [expert, column] = found[index];
            const auto slot = static_cast<size_t>(expert);
            const int64_t begin = padded ? expert * received.block_rows : full_offsets[slot];
            const int64_t position = begin + next[slot]++;
            if (position >= received.out_rows) {
                received.lost_here = true;
                continue;
            }
            ++received.counts[slot];
            received.expert_rows.push_back({static_cast<int32_t>(position), column});
        }
        received.first_expert_row.push_back(static_cast<int32_t>(received.expert_rows.size()));
    }
    if (padded) {
        received.num_recv = static_cast<int64_t>(received.expert_rows.size());
    }
}

namespace {

/// Addresses of the scale words of one row in the layout's scale tensor (4-byte words).
struct ScalePlace {
    int64_t first;
    int64_t stride;
};

ScalePlace scale_place(const RowFormat& format, RecvLayout recv_layout, const Received& received,
                       int64_t position) {
    if (recv_layout == RecvLayout::kToken) {
        return {position * format.scale_words(), 1};
    }
    const int64_t block = received.block_rows > 0 ? received.block_rows : received.out_rows;
    const int64_t stride = round_up(block, 4);
    const int64_t index = received.block_rows > 0 ? position / block : 0;
    return {index * format.scale_words() * stride + position % block, stride};
}

void write_scales(const RowFormat& format, RecvLayout recv_layout, const Received& received,
                  int64_t position, const std::byte* from, std::byte* scales) {
    const ScalePlace place = scale_place(format, recv_layout, received, position);
    if (place.stride == 1) {
        std::memcpy(scales + place.first * 4, from, static_cast<size_t>(format.scale_bytes));
        return;
    }
    for (int64_t word = 0; word < format.scale_words(); ++word) {
        std::memcpy(scales + (place.first + word * place.stride) * 4, from + word * 4, 4);
    }
}

void write_ids(const Received& received, const DeliverTarget& target) {
    const size_t size = received.topk_idx.size();
    if (target.topk_idx_is_int64) {
        std::copy_n(received.topk_idx.begin(), size, static_cast<int64_t*>(target.topk_idx));
    } else {
        std::copy_n(received.topk_idx.begin(), size, static_cast<int32_t*>(target.topk_idx));
    }
}

void write_token_metadata(const Received& received, const DeliverTarget& target) {
    if (target.topk_idx != nullptr) {
        write_ids(received, target);
    }
    if (target.topk_weights != nullptr) {
        std::copy(received.topk_weights.begin(), received.topk_weights.end(), target.topk_weights);
    }
}

void write_counts(const Delivery& delivery, const DeliverTarget& target) {
    const Received& received = delivery.received;
    std::copy(received.counts.begin(), received.counts.end(), target.counts);
    if (target.offsets != nullptr) {
        std::copy(received.offsets.begin(), received.offsets.end(), target.offsets);
    }
    *target.num_recv_tokens = static_cast<int32_t>(received.num_recv);
    *target.overflow = delivery.overflow;
}

/// Calls put(row, position, column) for every delivered copy of rows [begin, end).
template <typename Put>
void for_each_copy(RecvLayout recv_layout, const Received& received, int64_t begin, int64_t end,
                   Put&& put) {
    for (int64_t row = begin; row < end; ++row) {
        if (recv_layout == RecvLayout::kToken) {
            put(row, row, 0);
            continue;
        }
        const auto at = static_cast<size_t>(row);
        for (int32_t index = received.first_expert_row[at];
             index < received.first_expert_row[at + 1]; ++index) {
            const ExpertRow& copy = received.expert_rows[static_cast<size_t>(index)];
            put(row, copy.position, copy.column);
        }
    }
}

void zero_row_range(const RowFormat& format, std::byte* x, int64_t begin, int64_t end) {
    if (end > begin) {
        std::memset(x + begin * format.row_bytes, 0,
                    static_cast<size_t>((end - begin) * format.row_bytes));
    }
}

}  // namespace

void zero_padding_rows(const RowFormat& format, RecvLayout recv_layout, const Received& received,
                       std::byte* x) {
    if (recv_layout == RecvLayout::kToken) {
        zero_row_range(format, x, received.num_rows, received.out_rows);
        return;
    }
    for (size_t expert = 0; expert < received.counts.size(); ++expert) {
        const int64_t begin = received.block_rows > 0
                                  ? static_cast<int64_t>(expert) * received.block_rows
                                  : received.offsets[expert];
        const int64_t end =
            received.block_rows > 0 ? begin + received.block_rows : received.offsets[expert + 1];
        zero_row_range(format, x, begin + received.counts[expert], end);
    }
    if (received.block_rows == 0) {
        zero_row_range(format, x, received.offsets.back(), received.out_rows);
    }
}

void deliver(const Delivery& delivery, const DeliverTarget& target, const RowOps& ops,
             ThreadPool& pool) {
    const auto& [format, recv_layout, received, views, overflow] = delivery;
    if (recv_layout == RecvLayout::kToken) {
        write_token_metadata(received, target);
    }
    const bool expert_weights = recv_layout != RecvLayout::kToken &&
                                target.topk_weights != nullptr && !received.topk_weights.empty();
    const auto copy = target.stream ? ops.copy_stream : ops.copy;
    pool.parallel_for(received.num_rows, kGrainRows, [&](int64_t begin, int64_t end) {
        for_each_copy(
            recv_layout, received, begin, end, [&](int64_t row, int64_t position, int32_t column) {
                const RowView& view = views[static_cast<size_t>(row)];
                if (target.x != nullptr) {
                    copy(target.x + position * format.row_bytes, view.row, format.row_bytes);
                }
                if (target.scales != nullptr) {
                    write_scales(format, recv_layout, received, position, view.scales,
                                 target.scales);
                }
                if (expert_weights) {
                    target.topk_weights[position] =
                        received
                            .topk_weights[static_cast<size_t>(row * received.num_topk + column)];
                }
            });
        if (target.stream) {
            stream_fence();
        }
    });
    if (target.zero_padding && target.x != nullptr) {
        zero_padding_rows(format, recv_layout, received, target.x);
    }
    write_counts(delivery, target);
}

}  // namespace deepcomm::cpu
