// SPDX-License-Identifier: Apache-2.0
#include "cpu/combine.hpp"

#include <algorithm>

#include "common/error.hpp"
#include "cpu/combine_ring.hpp"
#include "cpu/staged_rows.hpp"

namespace deepcomm::cpu {

StagedRows::StagedRows(const Endpoint& endpoint, const Round& round, int64_t row_bytes,
                       const DispatchRecord& record)
    : row_bytes_(row_bytes),
      num_topk_(record.routing.num_topk),
      num_slots_(record.recv_layout == RecvLayout::kToken && record.capacity >= 0 ? record.capacity
                                                                                  : INT64_MAX),
      config_(endpoint.config()) {
    const layout::SegmentLayout& map = endpoint.map();
    for (int32_t local = 0; local < config_.ranks_per_node; ++local) {
        const Announcement& at = round.of(config_.node() * config_.ranks_per_node + local);
        const std::byte* const base = endpoint.base(local);
        const bool rows_there = at.rows_offset != Announcement::kThroughRing;
        rows_.push_back(rows_there ? base + at.rows_offset : nullptr);
        weights_.push_back(reinterpret_cast<const float*>(
            base + map.generation_begin(at.generation) + map.generation.topk_weights));
    }
}

namespace {

OpSignature signature_of(const CombineArgs& args) {
    OpSignature signature{};
    signature.kind = OpKind::kCombine;
    signature.dtype = args.format.dtype;
    signature.recv_layout = args.record->recv_layout;
    signature.expert_alignment = args.record->expert_alignment;
    signature.num_topk = args.record->routing.num_topk;
    signature.has_weights = args.outputs.topk_weights != nullptr;
    signature.apply_weights = args.apply_weights;
    signature.capacity = args.record->capacity;
    signature.handle_epoch = static_cast<int64_t>(args.record->epoch);
    return signature;
}

}  // namespace

CombineOp::CombineOp(Endpoint& endpoint, const CombineArgs& args)
    : endpoint_(endpoint), args_(args) {
    endpoint.check_usable(OpKind::kCombine);
}

CombineOp::Way CombineOp::choose_way(int32_t lent_generation) const {
    if (lent_generation >= 0) {
        return Way::kLent;
    }
    return endpoint_.config().num_nodes() == 1 ? Way::kRing : Way::kStaged;
}

int32_t CombineOp::choose_generation(int32_t lent_generation) {
    if (way_ == Way::kLent) {
        // Its metadata may still be read for an earlier combine of the same rows.
        endpoint_.wait_readers(endpoint_.last_read(lent_generation), OpKind::kCombine);
        return lent_generation;
    }
    return endpoint_.choose_landing(OpKind::kCombine).generation;
}

void CombineOp::stage() {
    const int64_t row_bytes = args_.format.row_bytes;
    const int64_t num_bytes = args_.record->received.num_rows * row_bytes;
    int32_t lent = -1;
    if (args_.record->recv_layout == RecvLayout::kToken && args_.outputs.row_stride == row_bytes &&
        num_bytes > 0) {
        lent = endpoint_.generation_of(args_.outputs.y, num_bytes);
    }
    way_ = choose_way(lent);
    const int32_t generation = choose_generation(lent);
    if (way_ == Way::kStaged && !endpoint_.ensure_rows(generation, num_bytes)) {
        throw CommError(format("combine: /dev/shm is full: %lld bytes needed to stage the rows",
                               static_cast<long long>(num_bytes)),
                        endpoint_.config().rank);
    }
    round_ = std::make_unique<Round>(endpoint_, signature_of(args_));
    endpoint_.mark_read(generation, round_->epoch());
    stage_rows(generation);
    AnnouncementBody body;
    body.num_tokens = args_.record->routing.num_tokens;
    body.rows_offset = rows_offset_;
    body.generation = generation;
    round_->announce(body);
}

void CombineOp::stage_rows(int32_t generation) {
    const layout::SegmentLayout& map = endpoint_.map();
    std::byte* const begin = endpoint_.own_base() + map.generation_begin(generation);
    std::byte* const rows = begin + map.generation.rows;
    auto* const weights = reinterpret_cast<float*>(begin + map.generation.topk_weights);
    const bool copies_rows = way_ == Way::kStaged;
    rows_offset_ = way_ == Way::kRing
                       ? Announcement::kThroughRing
                       : (copies_rows ? rows : args_.outputs.y) - endpoint_.own_base();
    const Received& received = args_.record->received;
    const int64_t row_bytes = args_.format.row_bytes;
    const bool carries = args_.outputs.topk_weights != nullptr;
    if (!copies_rows && !carries) {
        return;
    }
    const bool stream = received.num_rows * row_bytes >= kStreamBytes;
    const ReturnedRows returned{args_.format, args_.record->recv_layout, received, args_.outputs,
                                endpoint_.ops()};
    endpoint_.pool().parallel_for(received.num_rows, kGrainRows, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            const ReturnedRow target{copies_rows ? rows + row * row_bytes : nullptr,
                                     carries ? weights + row * received.num_topk : nullptr};
            returned.write(row, target, stream);
        }
        if (stream) {
            stream_fence();
        }
    });
}

const Routing& CombineOp::forwarded(int32_t source) const {
    return args_.record->forwarded[static_cast<size_t>(source)];
}

int64_t CombineOp::record_bytes() const {
    return layout::TokenRecord::make(args_.format.row_bytes, 0, args_.record->routing.num_topk)
        .stride;
}

int64_t CombineOp::num_rows_to(int32_t source) const { return forwarded(source).num_tokens; }

int64_t CombineOp::num_rows_from(int32_t node) const {
    const auto& lists = args_.record->routing.node_tokens;
    return static_cast<int64_t>(lists[static_cast<size_t>(node)].size());
}

void CombineOp::pack(int32_t source, int64_t begin, int64_t end, std::byte* records) {
    const StagedRows rows(endpoint_, *round_, args_.format.row_bytes, *args_.record);
    sum_node(endpoint_, forwarded(source), args_.format, rows, {begin, end}, records);
    const int64_t weights_bytes =
        args_.outputs.topk_weights != nullptr ? args_.record->routing.num_topk * 4 : 0;
    endpoint_.counters().bytes_network += (end - begin) * (args_.format.row_bytes + weights_bytes);
}

void CombineOp::finish(const std::vector<const std::byte*>& partials) {
    const Routing& routing = args_.record->routing;
    CombineRing ring(endpoint_, *round_, args_);
    if (ring.is_used()) {
        ring.run();
    } else {
        const StagedRows rows(endpoint_, *round_, args_.format.row_bytes, *args_.record);
        const NodePartials from_nodes{
            layout::TokenRecord::make(args_.format.row_bytes, 0, routing.num_topk), partials};
        sum_tokens(endpoint_, {*args_.record, args_.format, rows, from_nodes}, args_.target,
                   {0, routing.num_tokens});
    }
    endpoint_.finish_epoch(round_->epoch());
    ++endpoint_.counters().num_combines;
    count_bytes();
    if (way_ == Way::kLent) {
        // The caller may change its tensor as soon as this returns.
        endpoint_.wait_readers(round_->epoch(), OpKind::kCombine);
    }
}

void CombineOp::count_bytes() {
    const Received& received = args_.record->received;
    const auto own = static_cast<size_t>(endpoint_.config().rank);
    const int64_t own_rows = std::min(received.first_row[own + 1], received.num_rows) -
                             std::min(received.first_row[own], received.num_rows);
    endpoint_.counters().bytes_local += own_rows * args_.format.row_bytes;
    endpoint_.counters().bytes_node += (received.num_rows - own_rows) * args_.format.row_bytes;
}

}  // namespace deepcomm::cpu
