// SPDX-License-Identifier: Apache-2.0
#include "cpu/dispatch.hpp"

#include <algorithm>
#include <cstring>

#include "common/error.hpp"

namespace deepcomm::cpu {

namespace {

/// Rows of this rank's own tensor.
struct OwnRows {
    const DispatchArgs& args;
    const RowOps& ops;

    auto reader() const {
        return [this, rows = RowReader(args.input, args.format, ops)](int64_t token) mutable {
            return rows.read(token);
        };
    }
    const float* weights(int64_t token) const {
        return args.topk_weights == nullptr ? nullptr : args.topk_weights + token * args.num_topk;
    }
};

/// Rows of a rail peer, as records; index 0 is token first.
struct RecordRows {
    const layout::TokenRecord& format;
    const std::byte* records;
    int64_t first;
    bool has_weights;

    auto reader() const {
        return [this](int64_t token) {
            const std::byte* const record = records + (token - first) * format.stride;
            return RowView{record, record + format.scales_offset};
        };
    }
    const float* weights(int64_t token) const {
        return has_weights
                   ? reinterpret_cast<const float*>(records + (token - first) * format.stride +
                                                    format.topk_weights_offset)
                   : nullptr;
    }
};

OpSignature signature_of(const DispatchArgs& args) {
    OpSignature signature{};
    signature.kind = OpKind::kDispatch;
    signature.dtype = args.format.dtype;
    signature.scale_format = args.format.scale_format;
    signature.recv_layout = args.recv_layout;
    signature.expert_alignment = args.expert_alignment;
    signature.num_topk = args.num_topk;
    signature.has_weights = args.topk_weights != nullptr;
    signature.capacity = args.capacity;
    signature.handle_epoch = args.cached == nullptr ? 0 : static_cast<int64_t>(args.cached->epoch);
    return signature;
}

}  // namespace

DispatchOp::DispatchOp(Endpoint& endpoint, const DispatchArgs& args)
    : endpoint_(endpoint),
      args_(args),
      record_format_(layout::TokenRecord::make(args.format.row_bytes, args.format.scale_bytes,
                                               args.num_topk)) {
    endpoint.check_usable(OpKind::kDispatch);
    DEEPCOMM_CHECK_ARG(args.growable || args.num_tokens <= endpoint.config().max_tokens,
                       "x: expected at most max_tokens_per_rank = %d tokens, got %d",
                       endpoint.config().max_tokens, args.num_tokens);
    if (args.cached != nullptr) {
        record_ = std::make_shared<DispatchRecord>(*args.cached);
        record_->received.topk_weights.clear();  // those given now, or none
        return;
    }
    record_ = std::make_shared<DispatchRecord>();
    record_->recv_layout = args.recv_layout;
    record_->expert_alignment = args.expert_alignment;
    record_->capacity = args.capacity;
    record_->routing.num_tokens = args.num_tokens;
    record_->routing.num_topk = args.num_topk;
    counts_ =
        count_rows(endpoint.config(), args.topk_idx, args.topk_idx_is_int64, record_->routing);
}

void DispatchOp::announce() {
    const OpKind kind = OpKind::kDispatch;
    landing_ = endpoint_.choose_landing(kind);
    const int64_t most = endpoint_.config().shape().max_rows() * args_.format.row_bytes;
    if (!endpoint_.ensure_rows(landing_.generation, most)) {
        throw CommError(
            format("dispatch: /dev/shm is full: %lld bytes needed for a landing area of "
                   "%d-byte elements",
                   static_cast<long long>(most), static_cast<int>(dtype_bytes(args_.format.dtype))),
            endpoint_.config().rank);
    }
    round_ = std::make_unique<Round>(endpoint_, signature_of(args_));
    if (args_.cached == nullptr) {
        record_->epoch = round_->epoch();
    }
    AnnouncementBody body;
    body.num_tokens = args_.num_tokens;
    body.rows_offset = rows_offset();
    body.rows_reserved = endpoint_.rows_reserved(landing_.generation);
    body.generation = landing_.generation;
    body.counts = args_.cached == nullptr ? &counts_ : nullptr;
    round_->announce(body);
}

int64_t DispatchOp::rows_offset() const {
    return endpoint_.map().generation_begin(landing_.generation) + endpoint_.map().generation.rows;
}

void DispatchOp::plan() {
    const EndpointConfig& config = endpoint_.config();
    if (args_.cached == nullptr) {
        table_ = round_->counts();
        SlotAssigner(config, table_, config.rank, args_.expert_alignment).assign(record_->routing);
        record_->forwarded.resize(static_cast<size_t>(config.num_ranks));
        for (int32_t local = 0; local < config.ranks_per_node; ++local) {
            const int32_t rank = config.node() * config.ranks_per_node + local;
            record_->full_offsets.push_back(
                expert_offsets(config, table_, rank, args_.expert_alignment));
        }
    }
    rail_assigners_.resize(static_cast<size_t>(config.num_ranks));
    num_forwarded_.assign(static_cast<size_t>(config.num_ranks), 0);
    for (int32_t local = 0; local < config.ranks_per_node; ++local) {
        targets_.push_back(target_of(local));
    }
    const int64_t rows = static_cast<int64_t>(record_->routing.destinations.size());
    stream_ = rows * args_.format.row_bytes >= kStreamBytes;
    find_overflow();
}

DispatchOp::LocalTarget DispatchOp::target_of(int32_t local) const {
    const int32_t rank = endpoint_.config().node() * endpoint_.config().ranks_per_node + local;
    const Announcement& announced = round_->of(rank);
    const layout::SegmentLayout& map = endpoint_.map();
    std::byte* const begin = endpoint_.base(local) + map.generation_begin(announced.generation);
    LocalTarget target{};
    target.rows = begin + map.generation.rows;
    target.scales = begin + map.generation.scales;
    target.topk_idx = reinterpret_cast<int32_t*>(begin + map.generation.topk_idx);
    target.topk_weights = reinterpret_cast<float*>(begin + map.generation.topk_weights);
    target.source_token = reinterpret_cast<int32_t*>(begin + map.generation.source_token);
    target.direct = direct(local);
    const bool clipped = args_.recv_layout == RecvLayout::kToken && args_.capacity >= 0;
    target.num_slots = clipped ? args_.capacity : INT64_MAX;
    return target;
}

bool DispatchOp::direct(int32_t local) const {
    if (args_.recv_layout != RecvLayout::kExpert) {
        return args_.recv_layout == RecvLayout::kToken;
    }
    const int32_t rank = endpoint_.config().node() * endpoint_.config().ranks_per_node + local;
    const int64_t end = record_->full_offsets[static_cast<size_t>(local)].back();
    const int64_t rows = args_.capacity >= 0 ? std::min(args_.capacity, end) : end;
    return rows * args_.format.row_bytes <= round_->of(rank).rows_reserved;
}

void DispatchOp::find_overflow() {
    if (args_.capacity < 0) {
        return;
    }
    const Routing& routing = record_->routing;
    if (args_.recv_layout == RecvLayout::kToken) {
        overflow_ = std::any_of(routing.destinations.begin(), routing.destinations.end(),
                                [&](const Destination& to) { return to.slot >= args_.capacity; });
    } else {
        overflow_ = std::any_of(routing.expert_slots.begin(), routing.expert_slots.end(),
                                [&](int32_t slot) { return slot >= args_.capacity; });
    }
}

// ---- storing rows on the ranks of this node -----------------------------------------------------

void DispatchOp::store_metadata(const LocalTarget& target, const Destination& to,
                                const int32_t* ids, const float* weights) const {
    const int32_t num_local = endpoint_.config().num_local_experts();
    const int32_t first = to.rank * num_local;
    const int64_t at = static_cast<int64_t>(to.slot) * args_.num_topk;
    for (int32_t column = 0; column < args_.num_topk; ++column) {
        const int32_t local_id = ids[column] - first;
        const bool here = ids[column] >= 0 && local_id >= 0 && local_id < num_local;
        target.topk_idx[at + column] = here ? local_id : -1;
        if (weights != nullptr) {
            target.topk_weights[at + column] = here ? weights[column] : 0.0F;
        }
    }
}

void DispatchOp::store_token(const Routing& routing, int64_t token, const RowView& view,
                             const float* weights) {
    const EndpointConfig& config = endpoint_.config();
    const RowOps& ops = endpoint_.ops();
    const auto copy = stream_ ? ops.copy_stream : ops.copy;
    const int64_t row_bytes = args_.format.row_bytes;
    const int32_t* const ids = routing.topk_idx.data() + token * args_.num_topk;
    const int32_t* const expert_slots = routing.expert_slots.data() + token * args_.num_topk;
    const auto first = static_cast<size_t>(routing.first_destination[static_cast<size_t>(token)]);
    const auto last =
        static_cast<size_t>(routing.first_destination[static_cast<size_t>(token) + 1]);
    for (size_t index = first; index < last; ++index) {
        const Destination& to = routing.destinations[index];
        if (!config.is_local(to.rank)) {
            continue;
        }
        const LocalTarget& target = targets_[static_cast<size_t>(config.local_of(to.rank))];
        if (to.slot >= target.num_slots) {
            continue;
        }
        target.source_token[to.slot] = static_cast<int32_t>(token);
        store_metadata(target, to, ids, weights);
        if (view.scales != nullptr && args_.format.scale_bytes > 0) {
            std::memcpy(target.scales + to.slot * args_.format.scale_bytes, view.scales,
                        static_cast<size_t>(args_.format.scale_bytes));
        }
        if (args_.recv_layout != RecvLayout::kExpert || !target.direct) {
            copy(target.rows + to.slot * row_bytes, view.row, row_bytes);
            continue;
        }
        for (int32_t column = 0; column < args_.num_topk; ++column) {
            const bool here =
                ids[column] >= 0 && ids[column] / config.num_local_experts() == to.rank;
            if (here && (args_.capacity < 0 || expert_slots[column] < args_.capacity)) {
                copy(target.rows + expert_slots[column] * row_bytes, view.row, row_bytes);
            }
        }
    }
}

int64_t DispatchOp::metadata_bytes() const {
    return args_.format.scale_bytes + args_.num_topk * (args_.topk_weights != nullptr ? 8 : 4);
}

void DispatchOp::count_written(int32_t rank, int64_t num_bytes) {
    Counters& counters = endpoint_.counters();
    (rank == endpoint_.config().rank ? counters.bytes_local : counters.bytes_node) += num_bytes;
}

template <typename Source>
void DispatchOp::store_rows(const Routing& routing, int64_t begin, int64_t end,
                            const Source& source) {
    endpoint_.pool().parallel_for(end - begin, kGrainRows, [&](int64_t from, int64_t to) {
        auto read = source.reader();
        for (int64_t token = begin + from; token < begin + to; ++token) {
            if (routing.first_destination[static_cast<size_t>(token)] !=
                routing.first_destination[static_cast<size_t>(token) + 1]) {
                store_token(routing, token, read(token), source.weights(token));
            }
        }
        if (stream_) {
            stream_fence();
        }
    });
    const auto first = static_cast<size_t>(routing.first_destination[static_cast<size_t>(begin)]);
    const auto last = static_cast<size_t>(routing.first_destination[static_cast<size_t>(end)]);
    const int64_t row_bytes = args_.format.row_bytes + metadata_bytes();
    for (size_t index = first; index < last; ++index) {
        const Destination& to = routing.destinations[index];
        if (endpoint_.config().is_local(to.rank)) {
            count_written(to.rank, row_bytes);
        }
    }
}

void DispatchOp::push() {
    store_rows(record_->routing, 0, args_.num_tokens, OwnRows{args_, endpoint_.ops()});
    publish(endpoint_.config().rank);
}

void DispatchOp::publish(int32_t source) {
    for (int32_t local = 0; local < endpoint_.config().ranks_per_node; ++local) {
        endpoint_.arrival(local, source).store(round_->epoch(), std::memory_order_release);
        ring_doorbell(endpoint_.control(local));
    }
}

// ---- rails ---------------------------------------------------------------------------------------

int64_t DispatchOp::num_rows_to(int32_t node) const {
    return static_cast<int64_t>(record_->routing.node_tokens[static_cast<size_t>(node)].size());
}

int64_t DispatchOp::num_rows_from(int32_t source) const {
    if (args_.cached != nullptr) {
        return forwarded(source).num_tokens;
    }
    const RowCounts& counts = table_.ranks[static_cast<size_t>(source)];
    return counts.per_node[static_cast<size_t>(endpoint_.config().node())];
}

Routing& DispatchOp::forwarded(int32_t source) const {
    return record_->forwarded[static_cast<size_t>(source)];
}

void DispatchOp::pack(int32_t node, int64_t begin, int64_t end, std::byte* records) {
    const std::vector<int32_t>& tokens = record_->routing.node_tokens[static_cast<size_t>(node)];
    const OwnRows source{args_, endpoint_.ops()};
    const auto ids_bytes = static_cast<size_t>(args_.num_topk) * sizeof(int32_t);
    endpoint_.pool().parallel_for(end - begin, kGrainRows, [&](int64_t from, int64_t to) {
        auto read = source.reader();
        for (int64_t index = from; index < to; ++index) {
            const int32_t token = tokens[static_cast<size_t>(begin + index)];
            std::byte* const record = records + index * record_format_.stride;
            const RowView view = read(token);
            std::memcpy(record, view.row, static_cast<size_t>(args_.format.row_bytes));
            if (args_.format.scale_bytes > 0) {
                std::memcpy(record + record_format_.scales_offset, view.scales,
                            static_cast<size_t>(args_.format.scale_bytes));
            }
            std::memcpy(
                record + record_format_.topk_idx_offset,
                record_->routing.topk_idx.data() + static_cast<int64_t>(token) * args_.num_topk,
                ids_bytes);
            if (const float* const weights = source.weights(token)) {
                std::memcpy(record + record_format_.topk_weights_offset, weights, ids_bytes);
            }
        }
    });
    endpoint_.counters().bytes_network +=
        (end - begin) * (args_.format.row_bytes + metadata_bytes());
}

void DispatchOp::forward(int32_t source, int64_t num, const std::byte* records) {
    const auto at = static_cast<size_t>(source);
    Routing& routing = forwarded(source);
    const int64_t begin = num_forwarded_[at];
    num_forwarded_[at] += num;
    if (args_.cached == nullptr) {
        routing.num_topk = args_.num_topk;
        routing.num_tokens += static_cast<int32_t>(num);
        for (int64_t index = 0; index < num; ++index) {
            const auto* const ids = reinterpret_cast<const int32_t*>(
                records + index * record_format_.stride + record_format_.topk_idx_offset);
            routing.topk_idx.insert(routing.topk_idx.end(), ids, ids + args_.num_topk);
        }
        if (rail_assigners_[at] == nullptr) {
            rail_assigners_[at] = std::make_unique<SlotAssigner>(endpoint_.config(), table_, source,
                                                                 args_.expert_alignment);
        }
        rail_assigners_[at]->assign(routing, endpoint_.config().node());
    }
    store_rows(routing, begin, begin + num,
               RecordRows{record_format_, records, begin, args_.topk_weights != nullptr});
}

// ---- receiving -----------------------------------------------------------------------------------

void DispatchOp::receive() {
    const EndpointConfig& config = endpoint_.config();
    for (int32_t source = 0; source < config.num_ranks; ++source) {
        const auto& word = endpoint_.arrival(config.local(), source);
        endpoint_.wait_on(config.local_of(source), source, OpKind::kDispatch, "its rows",
                          [&] { return word.load(std::memory_order_acquire) >= round_->epoch(); });
    }
    record_received();
    overflow_ = overflow_ || record_->received.lost_here;
}

void DispatchOp::record_received() {
    const EndpointConfig& config = endpoint_.config();
    Received& received = record_->received;
    const LocalTarget& own = targets_[static_cast<size_t>(config.local())];
    if (args_.cached == nullptr) {
        received.num_topk = args_.num_topk;
        received.first_row.push_back(0);
        for (int32_t source = 0; source < config.num_ranks; ++source) {
            received.first_row.push_back(received.first_row.back() +
                                         table_.rows_from(source, config.rank));
        }
        received.num_rows =
            static_cast<int32_t>(std::min<int64_t>(received.first_row.back(), own.num_slots));
        received.topk_idx.assign(
            own.topk_idx, own.topk_idx + static_cast<int64_t>(received.num_rows) * args_.num_topk);
        received.source_token.assign(own.source_token, own.source_token + received.num_rows);
        place_rows(config, args_.recv_layout, args_.capacity,
                   record_->full_offsets[static_cast<size_t>(config.local())], received);
    }
    if (args_.topk_weights != nullptr) {
        received.topk_weights.assign(
            own.topk_weights,
            own.topk_weights + static_cast<int64_t>(received.num_rows) * args_.num_topk);
    }
}

std::vector<RowView> DispatchOp::received_views() const {
    const LocalTarget& own = targets_[static_cast<size_t>(endpoint_.config().local())];
    std::vector<RowView> views(static_cast<size_t>(record_->received.num_rows));
    for (size_t row = 0; row < views.size(); ++row) {
        const auto index = static_cast<int64_t>(row);
        views[row] = {own.rows + index * args_.format.row_bytes,
                      own.scales + index * args_.format.scale_bytes};
    }
    return views;
}

void DispatchOp::deliver_to(const DeliverTarget& target) {
    const Received& received = record_->received;
    DeliverTarget rest = target;
    const bool flat = target.x != nullptr && rows_in_place();
    if (flat) {  // the landing area already has the layout's order
        const std::byte* const rows =
            targets_[static_cast<size_t>(endpoint_.config().local())].rows;
        const int64_t row_bytes = args_.format.row_bytes;
        const int64_t num_rows = std::min(received.out_rows, received.num_recv);
        const auto copy = target.stream ? endpoint_.ops().copy_stream : endpoint_.ops().copy;
        endpoint_.pool().parallel_for(num_rows, kGrainRows, [&](int64_t begin, int64_t end) {
            copy(target.x + begin * row_bytes, rows + begin * row_bytes, (end - begin) * row_bytes);
            if (target.stream) {
                stream_fence();
            }
        });
        if (target.zero_padding) {
            zero_padding_rows(args_.format, args_.recv_layout, received, target.x);
        }
        rest.x = nullptr;
    } else if (target.x == nullptr && target.zero_padding) {
        zero_padding_rows(args_.format, args_.recv_layout, received,
                          targets_[static_cast<size_t>(endpoint_.config().local())].rows);
    }
    deliver(args_.format, args_.recv_layout, received, received_views(), rest, endpoint_.ops(),
            endpoint_.pool());
}

std::shared_ptr<const DispatchRecord> DispatchOp::finish() {
    endpoint_.finish_epoch(round_->epoch());
    Counters& counters = endpoint_.counters();
    ++counters.num_dispatches;
    counters.tokens_sent += args_.num_tokens;
    counters.tokens_received += record_->received.num_rows;
    if (args_.recv_layout == RecvLayout::kExpert && !rows_in_place()) {
        // Next time the rows of such a routing fit, and go straight to their place.
        const int64_t slack = record_->received.num_recv / 8;
        endpoint_.ensure_rows(landing_.generation,
                              (record_->received.num_recv + slack) * args_.format.row_bytes);
    }
    return record_;
}

}  // namespace deepcomm::cpu
