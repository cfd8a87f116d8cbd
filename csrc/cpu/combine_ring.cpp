// SPDX-License-Identifier: Apache-2.0
#include "cpu/combine_ring.hpp"

#include <algorithm>

#include "cpu/staged_rows.hpp"

namespace deepcomm::cpu {

/// Where the rows of one block lie: in ring slots, or where their rank lent them.
class CombineRing::BlockRows : public RowSource {
  public:
    BlockRows(const CombineRing& ring, const StagedRows& lent, TokenRange tokens, int64_t block)
        : lent_(lent), config_(ring.endpoint_.config()), row_bytes_(ring.args_.format.row_bytes) {
        const auto num_local = static_cast<size_t>(config_.ranks_per_node);
        slots_.assign(num_local, nullptr);
        first_.assign(num_local, -1);
        const Routing& routing = ring.args_.record->routing;
        for (int32_t local = 0; local < config_.ranks_per_node; ++local) {
            if (ring.through_ring(local)) {
                slots_[static_cast<size_t>(local)] = ring.slot(local, block, config_.local());
            }
        }
        for (int64_t index = routing.first_destination[static_cast<size_t>(tokens.begin)];
             index < routing.first_destination[static_cast<size_t>(tokens.end)]; ++index) {
            const Destination& to = routing.destinations[static_cast<size_t>(index)];
            int64_t& first = first_[static_cast<size_t>(config_.local_of(to.rank))];
            first = first < 0 ? to.slot : first;
        }
        if (ring.own_in_place_) {
            own_rows_ = ring.args_.outputs.y;
            own_stride_ = ring.args_.outputs.row_stride;
        }
    }

    const std::byte* row(const Destination& at) const override {
        if (own_rows_ != nullptr && at.rank == config_.rank) {
            return own_rows_ + at.slot * own_stride_;
        }
        const auto local = static_cast<size_t>(config_.local_of(at.rank));
        return slots_[local] == nullptr ? lent_.row(at)
                                        : slots_[local] + (at.slot - first_[local]) * row_bytes_;
    }
    const float* weights(const Destination& at) const override { return lent_.weights(at); }

  private:
    const StagedRows& lent_;
    const EndpointConfig& config_;
    int64_t row_bytes_;
    std::vector<const std::byte*> slots_;
    std::vector<int64_t> first_;
    const std::byte* own_rows_ = nullptr;
    int64_t own_stride_ = 0;
};

CombineRing::CombineRing(Endpoint& endpoint, const Round& round, const CombineArgs& args)
    : endpoint_(endpoint), round_(round), args_(args) {
    const EndpointConfig& config = endpoint.config();
    block_tokens_ = endpoint.map().ring_tokens(config.ranks_per_node, args.format.row_bytes);
    num_blocks_ = ceil_div(round.max_tokens(), block_tokens_);
    own_in_place_ = through_ring(config.local()) && args.record->recv_layout == RecvLayout::kToken;
}

bool CombineRing::through_ring(int32_t local) const {
    const int32_t rank = endpoint_.config().node() * endpoint_.config().ranks_per_node + local;
    return round_.of(rank).rows_offset == Announcement::kThroughRing;
}

bool CombineRing::is_used() const {
    for (int32_t local = 0; local < endpoint_.config().ranks_per_node; ++local) {
        if (through_ring(local)) {
            return true;
        }
    }
    return false;
}

std::byte* CombineRing::slot(int32_t local, int64_t block, int32_t for_local) const {
    const int64_t index =
        block % layout::kRingDepth * endpoint_.config().ranks_per_node + for_local;
    return endpoint_.base(local) + endpoint_.map().ring +
           index * block_tokens_ * args_.format.row_bytes;
}

TokenRange CombineRing::rows_of(int32_t source, int64_t block) const {
    const Received& received = args_.record->received;
    const auto row_at = [&](size_t index) {
        return received.source_token.begin() +
               std::min(received.first_row[index], received.num_rows);
    };
    const auto first = row_at(static_cast<size_t>(source));
    const auto last = row_at(static_cast<size_t>(source) + 1);
    const auto begin = std::lower_bound(first, last, block * block_tokens_);
    const auto end = std::lower_bound(begin, last, (block + 1) * block_tokens_);
    return {begin - received.source_token.begin(), end - received.source_token.begin()};
}

void CombineRing::stage_for(int32_t source, int64_t block) {
    const TokenRange rows = rows_of(source, block);
    std::byte* const target =
        slot(endpoint_.config().local(), block, endpoint_.config().local_of(source));
    const ReturnedRows returned{args_.format, args_.record->recv_layout, args_.record->received,
                                args_.outputs, endpoint_.ops()};
    endpoint_.pool().parallel_for(rows.end - rows.begin, kGrainRows, [&](int64_t from, int64_t to) {
        for (int64_t index = from; index < to; ++index) {
            returned.write(rows.begin + index, {target + index * args_.format.row_bytes, nullptr},
                           false);
        }
    });
}

void CombineRing::stage(int64_t block) {
    const EndpointConfig& config = endpoint_.config();
    const int64_t reused = block - layout::kRingDepth;
    for (int32_t step = 1; step <= config.ranks_per_node; ++step) {
        // Beginning with the next rank, so that not all are writing for the same one.
        const int32_t local = (config.local() + step) % config.ranks_per_node;
        const int32_t source = config.node() * config.ranks_per_node + local;
        if (own_in_place_ && source == config.rank) {
            continue;
        }
        if (reused >= 0) {
            const auto& consumed = endpoint_.control(local).consumed;
            endpoint_.wait_for(source, OpKind::kCombine, "room in the ring", [&] {
                return consumed.load(std::memory_order_acquire) >=
                       ring_step(round_.epoch(), reused + 1);
            });
        }
        stage_for(source, block);
    }
    endpoint_.own_control().staged.store(ring_step(round_.epoch(), block + 1),
                                         std::memory_order_release);
    endpoint_.ring_all();
}

void CombineRing::consume(int64_t block) {
    const EndpointConfig& config = endpoint_.config();
    for (int32_t local = 0; local < config.ranks_per_node; ++local) {
        if (!through_ring(local)) {
            continue;
        }
        const auto& staged = endpoint_.control(local).staged;
        const int32_t rank = config.node() * config.ranks_per_node + local;
        endpoint_.wait_for(rank, OpKind::kCombine, "its rows in the ring", [&] {
            return staged.load(std::memory_order_acquire) >= ring_step(round_.epoch(), block + 1);
        });
    }
    const int64_t num_tokens = args_.record->routing.num_tokens;
    const TokenRange tokens{std::min(block * block_tokens_, num_tokens),
                            std::min((block + 1) * block_tokens_, num_tokens)};
    const StagedRows lent(endpoint_, round_, args_.format.row_bytes, *args_.record);
    const BlockRows rows(*this, lent, tokens, block);
    sum_tokens(endpoint_, {*args_.record, args_.format, rows, NodePartials{}}, args_.target,
               tokens);
    endpoint_.own_control().consumed.store(ring_step(round_.epoch(), block + 1),
                                           std::memory_order_release);
    endpoint_.ring_all();
}

void CombineRing::run() {
    const bool stages = through_ring(endpoint_.config().local());
    constexpr int64_t kAhead = 1;  // stage the next block before waiting for this one
    for (int64_t block = -kAhead; block < num_blocks_; ++block) {
        if (stages && block + kAhead < num_blocks_) {
            stage(block + kAhead);
        }
        if (block >= 0) {
            consume(block);
        }
    }
}

}  // namespace deepcomm::cpu
