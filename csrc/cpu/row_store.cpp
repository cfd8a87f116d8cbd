// SPDX-License-Identifier: Apache-2.0
#include "cpu/row_store.hpp"

#include <cstring>

namespace deepcomm::cpu {

TokenRows TokenRows::of_records(const layout::TokenRecord& format, const StoreFormat& rows,
                                const std::byte* records, int64_t first_token) {
    TokenRows result{};
    result.input.rows = records;
    result.input.row_stride = format.stride;
    result.input.scales = records + format.scales_offset;
    result.input.scale_stride = format.stride;
    result.input.dtype = rows.row.dtype;
    result.topk_weights = rows.has_weights ? records + format.topk_weights_offset : nullptr;
    result.weights_stride = format.stride;
    result.first_token = first_token;
    return result;
}

const float* TokenRows::weights(int64_t token) const {
    return topk_weights == nullptr ? nullptr
                                   : reinterpret_cast<const float*>(
                                         topk_weights + (token - first_token) * weights_stride);
}

void RowStore::store(const Routing& routing, int64_t begin, int64_t end, const TokenRows& rows) {
    constexpr int64_t kLine = 64;
    const bool while_casting =
        stream_ && rows.input.quantize && format_.row.row_bytes % kLine == 0;  // areas are aligned
    endpoint_.pool().parallel_for(end - begin, kGrainRows, [&](int64_t from, int64_t to) {
        RowReader reader(rows.input, format_.row, endpoint_.ops());
        std::vector<std::byte*> places;
        for (int64_t token = begin + from; token < begin + to; ++token) {
            const auto at = static_cast<size_t>(token);
            if (routing.first_destination[at] == routing.first_destination[at + 1]) {
                continue;
            }
            places.clear();
            find_places(routing, token, places);
            const CastCopies copies{places.data(), static_cast<int32_t>(places.size())};
            const RowView view =
                reader.read(token - rows.first_token, while_casting ? copies : CastCopies{});
            for (size_t place = 0; !while_casting && place < places.size(); ++place) {
                copy_row(places[place], view.row);
            }
            store_beside(routing, token, view.scales, rows.weights(token));
        }
        if (stream_) {
            stream_fence();
        }
    });
    count_written(routing, begin, end);
}

template <typename Body>
void RowStore::for_each_here(const Routing& routing, int64_t token, Body&& body) const {
    const auto at = static_cast<size_t>(token);
    for (int32_t index = routing.first_destination[at]; index < routing.first_destination[at + 1];
         ++index) {
        const Destination& to = routing.destinations[static_cast<size_t>(index)];
        if (endpoint_.config().is_local(to.rank)) {
            const LandingArea& target = area(endpoint_.config().local_of(to.rank));
            if (to.slot < target.num_slots) {
                body(target, to);
            }
        }
    }
}

void RowStore::find_places(const Routing& routing, int64_t token,
                           std::vector<std::byte*>& places) const {
    for_each_here(routing, token, [&](const LandingArea& target, const Destination& to) {
        if (format_.recv_layout == RecvLayout::kExpert && target.direct) {
            find_copies(target, to.rank, routing, token, places);
        } else {
            places.push_back(target.rows + to.slot * format_.row.row_bytes);
        }
    });
}

void RowStore::store_beside(const Routing& routing, int64_t token, const std::byte* scales,
                            const float* weights) const {
    for_each_here(routing, token, [&](const LandingArea& target, const Destination& to) {
        target.source_token[to.slot] = static_cast<int32_t>(token);
        store_metadata(target, to, routing.ids(token), weights);
        if (format_.row.scale_bytes > 0) {
            std::memcpy(target.scales + to.slot * format_.row.scale_bytes, scales,
                        static_cast<size_t>(format_.row.scale_bytes));
        }
    });
}

void RowStore::store_metadata(const LandingArea& area, const Destination& to, const int32_t* ids,
                              const float* weights) const {
    const int32_t num_local = endpoint_.config().num_local_experts();
    const int32_t first = to.rank * num_local;
    const int64_t at = static_cast<int64_t>(to.slot) * format_.num_topk;
    for (int32_t column = 0; column < format_.num_topk; ++column) {
        const int32_t local_id = ids[column] - first;
        const bool here = ids[column] >= 0 && local_id >= 0 && local_id < num_local;
        area.topk_idx[at + column] = here ? local_id : -1;
        if (weights != nullptr) {
            area.topk_weights[at + column] = here ? weights[column] : 0.0F;
        }
    }
}

void RowStore::find_copies(const LandingArea& area, int32_t rank, const Routing& routing,
                           int64_t token, std::vector<std::byte*>& places) const {
    const int32_t* const ids = routing.ids(token);
    const int32_t* const slots = routing.expert_slots.data() + token * format_.num_topk;
    const int32_t num_local = endpoint_.config().num_local_experts();
    for (int32_t column = 0; column < format_.num_topk; ++column) {
        const bool here = ids[column] >= 0 && ids[column] / num_local == rank;
        if (here && (format_.capacity < 0 || slots[column] < format_.capacity)) {
            places.push_back(area.rows + slots[column] * format_.row.row_bytes);
        }
    }
}

void RowStore::copy_row(std::byte* dst, const std::byte* row) const {
    (stream_ ? endpoint_.ops().copy_stream : endpoint_.ops().copy)(dst, row, format_.row.row_bytes);
}

void RowStore::count_written(const Routing& routing, int64_t begin, int64_t end) {
    const EndpointConfig& config = endpoint_.config();
    int64_t own_bytes = 0;
    int64_t node_bytes = 0;
    for (int64_t token = begin; token < end; ++token) {
        const auto at = static_cast<size_t>(token);
        for (int32_t index = routing.first_destination[at];
             index < routing.first_destination[at + 1]; ++index) {
            const Destination& to = routing.destinations[static_cast<size_t>(index)];
            if (config.is_local(to.rank)) {
                (to.rank == config.rank ? own_bytes : node_bytes) +=
                    bytes_written(routing, token, to);
            }
        }
    }
    endpoint_.counters().bytes_local += own_bytes;
    endpoint_.counters().bytes_node += node_bytes;
}

int64_t RowStore::bytes_written(const Routing& routing, int64_t token,
                                const Destination& to) const {
    const LandingArea& target = area(endpoint_.config().local_of(to.rank));
    if (to.slot >= target.num_slots) {
        return 0;
    }
    if (format_.recv_layout != RecvLayout::kExpert || !target.direct) {
        return format_.bytes();
    }
    const int32_t* const ids = routing.ids(token);
    const int32_t* const slots = routing.expert_slots.data() + token * format_.num_topk;
    int64_t num_rows = 0;
    for (int32_t column = 0; column < format_.num_topk; ++column) {
        num_rows += ids[column] >= 0 &&
                    ids[column] / endpoint_.config().num_local_experts() == to.rank &&
                    (format_.capacity < 0 || slots[column] < format_.capacity);
    }
    return num_rows * format_.row.row_bytes + format_.metadata_bytes();
}

}  // namespace deepcomm::cpu
