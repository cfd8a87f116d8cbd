// SPDX-License-Identifier: Apache-2.0
#include "cpu/dispatch.hpp"

#include <algorithm>
#include <cstring>

#include "common/error.hpp"

namespace deepcomm::cpu {

namespace {

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
      record_format_(
          layout::TokenRecord::make(args.format.row_bytes, args.format.scale_bytes, args.num_topk)),
      store_(endpoint, {args.format, args.num_topk, args.recv_layout, args.capacity,
                        args.topk_weights != nullptr}) {
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
    try {
        assign_slots();
    } catch (const Error&) {  // alike on all ranks, before any row is stored
        endpoint_.finish_epoch(round_->epoch());
        throw;
    }
}

void DispatchOp::assign_slots() {
    const EndpointConfig& config = endpoint_.config();
    DEEPCOMM_ASSERT(round_->max_tokens() <= config.max_tokens, "%d tokens announced for %d",
                    round_->max_tokens(), config.max_tokens);
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
        store_.add_area(area_of(local));
    }
    const int64_t rows = static_cast<int64_t>(record_->routing.destinations.size());
    store_.set_stream(rows * args_.format.row_bytes >= kStreamBytes);
    find_overflow();
}

LandingArea DispatchOp::area_of(int32_t local) const {
    const int32_t rank = endpoint_.config().node() * endpoint_.config().ranks_per_node + local;
    const layout::SegmentLayout& map = endpoint_.map();
    std::byte* const begin =
        endpoint_.base(local) + map.generation_begin(round_->of(rank).generation);
    LandingArea area{};
    area.rows = begin + map.generation.rows;
    area.scales = begin + map.generation.scales;
    area.topk_idx = reinterpret_cast<int32_t*>(begin + map.generation.topk_idx);
    area.topk_weights = reinterpret_cast<float*>(begin + map.generation.topk_weights);
    area.source_token = reinterpret_cast<int32_t*>(begin + map.generation.source_token);
    area.direct = direct(local);
    const bool clipped = args_.recv_layout == RecvLayout::kToken && args_.capacity >= 0;
    area.num_slots = clipped ? args_.capacity : INT64_MAX;
    return area;
}

TokenRows DispatchOp::own_rows() const {
    return {args_.input, reinterpret_cast<const std::byte*>(args_.topk_weights),
            args_.num_topk * static_cast<int64_t>(sizeof(float)), 0};
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

void DispatchOp::push() {
    plan();
    store_.store(record_->routing, 0, args_.num_tokens, own_rows());
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
    const TokenRows source = own_rows();
    endpoint_.pool().parallel_for(end - begin, kGrainRows, [&](int64_t from, int64_t to) {
        RowReader reader(source.input, args_.format, endpoint_.ops());
        for (int64_t index = from; index < to; ++index) {
            const int32_t token = tokens[static_cast<size_t>(begin + index)];
            pack_record(record_format_,
                        {reader.read(token), record_->routing.ids(token), source.weights(token),
                         args_.num_topk},
                        records + index * record_format_.stride);
        }
    });
    endpoint_.counters().bytes_network += (end - begin) * store_.format().bytes();
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
    store_.store(routing, begin, begin + num,
                 TokenRows::of_records(record_format_, store_.format(), records, begin));
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
    const LandingArea& own = own_area();
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
    const LandingArea& own = own_area();
    std::vector<RowView> views(static_cast<size_t>(record_->received.num_rows));
    for (size_t row = 0; row < views.size(); ++row) {
        const auto index = static_cast<int64_t>(row);
        views[row] = {own.rows + index * args_.format.row_bytes,
                      own.scales + index * args_.format.scale_bytes};
    }
    return views;
}

void DispatchOp::copy_in_place_rows(const DeliverTarget& target) const {
    const int64_t row_bytes = args_.format.row_bytes;
    const std::byte* const rows = own_area().rows;
    const auto copy = target.stream ? endpoint_.ops().copy_stream : endpoint_.ops().copy;
    const int64_t num_rows = std::min(record_->received.out_rows, record_->received.num_recv);
    endpoint_.pool().parallel_for(num_rows, kGrainRows, [&](int64_t begin, int64_t end) {
        copy(target.x + begin * row_bytes, rows + begin * row_bytes, (end - begin) * row_bytes);
        if (target.stream) {
            stream_fence();
        }
    });
}

void DispatchOp::deliver_to(const DeliverTarget& target) {
    DeliverTarget rest = target;
    if (rows_in_place()) {  // the landing area already has the layout's order
        if (target.x != nullptr) {
            copy_in_place_rows(target);
        }
        if (target.zero_padding) {
            zero_padding_rows(args_.format, args_.recv_layout, record_->received,
                              target.x != nullptr ? target.x : own_area().rows);
        }
        rest.x = nullptr;
    }
    deliver({args_.format, args_.recv_layout, record_->received, received_views(), overflow_}, rest,
            endpoint_.ops(), endpoint_.pool());
}

std::shared_ptr<std::byte> DispatchOp::lease_rows() const {
    const int64_t num_bytes = record_->received.out_rows * args_.format.row_bytes;
    const bool fits = num_bytes > 0 && num_bytes <= endpoint_.rows_reserved(landing_.generation);
    if (!fits || !landing_.leasable || !rows_in_place()) {
        return nullptr;
    }
    return endpoint_.lease(landing_.generation, rows_offset());
}

std::shared_ptr<const DispatchRecord> DispatchOp::finish(const DeliverTarget* target) {
    if (target != nullptr) {
        deliver_to(*target);
    }
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
