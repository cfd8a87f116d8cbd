// SPDX-License-Identifier: Apache-2.0
#include "cpu/combine.hpp"

#include <algorithm>

#include "common/error.hpp"

namespace deepcomm::cpu {

namespace {

/// Rows as announced by the ranks of this node.
class StagedRows : public RowSource {
  public:
    StagedRows(const Endpoint& endpoint, const Round& round, int64_t row_bytes, int32_t num_topk)
        : row_bytes_(row_bytes), num_topk_(num_topk), config_(endpoint.config()) {
        for (int32_t local = 0; local < config_.ranks_per_node; ++local) {
            const Announcement& at = round.of(config_.node() * config_.ranks_per_node + local);
            const std::byte* const base = endpoint.base(local);
            rows_.push_back(base + at.rows_offset);
            weights_.push_back(reinterpret_cast<const float*>(
                base + endpoint.map().generation_begin(at.generation) +
                endpoint.map().generation.topk_weights));
        }
    }

    const std::byte* row(const Destination& at) const override {
        return rows_[static_cast<size_t>(config_.local_of(at.rank))] + at.slot * row_bytes_;
    }
    const float* weights(const Destination& at) const override {
        return weights_[static_cast<size_t>(config_.local_of(at.rank))] +
               static_cast<int64_t>(at.slot) * num_topk_;
    }

  private:
    int64_t row_bytes_;
    int32_t num_topk_;
    const EndpointConfig& config_;
    std::vector<const std::byte*> rows_;
    std::vector<const float*> weights_;
};

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

void CombineOp::stage() {
    const int64_t row_bytes = args_.format.row_bytes;
    const int64_t num_bytes = args_.record->received.num_rows * row_bytes;
    int32_t generation = -1;
    if (args_.record->recv_layout == RecvLayout::kToken && args_.outputs.row_stride == row_bytes &&
        num_bytes > 0) {
        generation = endpoint_.generation_of(args_.outputs.y, num_bytes);
    }
    zero_copy_ = generation >= 0;
    if (!zero_copy_) {
        generation = endpoint_.choose_landing(OpKind::kCombine).generation;
        if (!endpoint_.ensure_rows(generation, num_bytes)) {
            throw CommError(format("combine: /dev/shm is full: %lld bytes needed to stage the rows",
                                   static_cast<long long>(num_bytes)),
                            endpoint_.config().rank);
        }
    } else {
        // Its metadata may still be read for an earlier combine of the same rows.
        endpoint_.wait_readers(endpoint_.last_read(generation), OpKind::kCombine);
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
    rows_offset_ = (zero_copy_ ? args_.outputs.y : rows) - endpoint_.own_base();
    const Received& received = args_.record->received;
    const int64_t row_bytes = args_.format.row_bytes;
    const bool carries = args_.outputs.topk_weights != nullptr;
    if (zero_copy_ && !carries) {
        return;
    }
    const bool stream = received.num_rows * row_bytes >= kStreamBytes;
    endpoint_.pool().parallel_for(received.num_rows, kGrainRows, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            const ReturnedRow target{zero_copy_ ? nullptr : rows + row * row_bytes,
                                     carries ? weights + row * received.num_topk : nullptr};
            return_row(args_.format, args_.record->recv_layout, received, row, args_.outputs,
                       target, endpoint_.ops(), stream);
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
    const StagedRows rows(endpoint_, *round_, args_.format.row_bytes,
                          args_.record->routing.num_topk);
    sum_node(endpoint_, forwarded(source), args_.format, rows, begin, end, records);
    const int64_t weights_bytes =
        args_.outputs.topk_weights != nullptr ? args_.record->routing.num_topk * 4 : 0;
    endpoint_.counters().bytes_network += (end - begin) * (args_.format.row_bytes + weights_bytes);
}

void CombineOp::finish(const std::vector<const std::byte*>& partials) {
    const Routing& routing = args_.record->routing;
    const StagedRows rows(endpoint_, *round_, args_.format.row_bytes, routing.num_topk);
    const NodePartials from_nodes{
        layout::TokenRecord::make(args_.format.row_bytes, 0, routing.num_topk), partials};
    sum_tokens(endpoint_, *args_.record, args_.format, rows, from_nodes, args_.target);
    endpoint_.finish_epoch(round_->epoch());
    Counters& counters = endpoint_.counters();
    ++counters.num_combines;
    const int32_t own = endpoint_.config().rank;
    const Received& received = args_.record->received;
    const auto at = static_cast<size_t>(own);
    const int64_t own_rows = std::min(received.first_row[at + 1], received.num_rows) -
                             std::min(received.first_row[at], received.num_rows);
    counters.bytes_local += own_rows * args_.format.row_bytes;
    counters.bytes_node += (received.num_rows - own_rows) * args_.format.row_bytes;
    if (zero_copy_) {
        // The caller may change its tensor as soon as this returns.
        endpoint_.wait_readers(round_->epoch(), OpKind::kCombine);
    }
}

}  // namespace deepcomm::cpu
