// SPDX-License-Identifier: Apache-2.0
#include "cpu/round.hpp"

#include <algorithm>
#include <cstring>

#include "common/error.hpp"

namespace deepcomm::cpu {

namespace {

int32_t* counts_of(Announcement& slot) {
    return reinterpret_cast<int32_t*>(reinterpret_cast<std::byte*>(&slot) +
                                      layout::kAnnouncementHeadBytes);
}

/// Everything of an announcement but its epoch word, which is published last.
std::byte* content_of(Announcement& slot) {
    return reinterpret_cast<std::byte*>(&slot) + sizeof(slot.epoch);
}

}  // namespace

Round::Round(Endpoint& endpoint, const OpSignature& signature)
    : endpoint_(endpoint), signature_(signature), epoch_(endpoint.next_epoch()) {}

Announcement& Round::prepare(OpStatus status) {
    // The slot held epoch - 2: after an abort this rank can be ahead of its readers.
    if (epoch_ > 2) {
        endpoint_.wait_readers(epoch_ - 2, signature_.kind);
    }
    Announcement& slot = endpoint_.own_announcement(endpoint_.config().node(), epoch_);
    slot.status = status;
    slot.signature = signature_;
    slot.message[0] = '\0';
    return slot;
}

void Round::publish(Announcement& slot) {
    slot.epoch.store(epoch_, std::memory_order_release);
    endpoint_.ring_all();
}

void Round::announce(const AnnouncementBody& body) {
    Announcement& slot = prepare(OpStatus::kOk);
    slot.num_tokens = body.num_tokens;
    slot.rows_offset = body.rows_offset;
    slot.rows_reserved = body.rows_reserved;
    slot.generation = body.generation;
    if (body.counts != nullptr) {
        int32_t* target = counts_of(slot);
        target = std::copy(body.counts->per_rank.begin(), body.counts->per_rank.end(), target);
        target = std::copy(body.counts->per_node.begin(), body.counts->per_node.end(), target);
        std::copy(body.counts->per_expert.begin(), body.counts->per_expert.end(), target);
    }
    publish(slot);
}

void Round::abort(const std::string& message) {
    Announcement& slot = prepare(OpStatus::kAborted);
    copy_message(slot.message, message);
    publish(slot);
}

std::string Round::serialized() const {
    Announcement& slot = endpoint_.own_announcement(endpoint_.config().node(), epoch_);
    const int64_t size = endpoint_.map().announcement_stride;
    std::string bytes(reinterpret_cast<const char*>(&slot), static_cast<size_t>(size));
    std::memcpy(bytes.data(), &epoch_, sizeof(epoch_));
    return bytes;
}

void Round::relay(int32_t node, const std::string& bytes) {
    const auto size = static_cast<size_t>(endpoint_.map().announcement_stride);
    uint64_t sent_epoch = 0;
    std::memcpy(&sent_epoch, bytes.data(), sizeof(sent_epoch));
    DEEPCOMM_ASSERT(bytes.size() == size && sent_epoch == epoch_,
                    "announcement of node %d: %zu bytes of epoch %llu, expected %zu of epoch %llu",
                    node, bytes.size(), static_cast<unsigned long long>(sent_epoch), size,
                    static_cast<unsigned long long>(epoch_));
    Announcement& slot = endpoint_.own_announcement(node, epoch_);
    std::memcpy(content_of(slot), bytes.data() + sizeof(slot.epoch), size - sizeof(slot.epoch));
    publish(slot);
}

int32_t Round::wait_all() {
    const EndpointConfig& config = endpoint_.config();
    for (int32_t rank = 0; rank < config.num_ranks; ++rank) {
        const Announcement& slot = of(rank);
        endpoint_.wait_on(config.local_of(rank), rank, signature_.kind, "its announcement",
                          [&] { return slot.epoch.load(std::memory_order_acquire) >= epoch_; });
    }
    try {
        check_all();
    } catch (const Error&) {
        endpoint_.finish_epoch(epoch_);
        throw;
    }
    return max_tokens();
}

void Round::check_all() const {
    const EndpointConfig& config = endpoint_.config();
    for (int32_t rank = 0; rank < config.num_ranks; ++rank) {
        const Announcement& slot = of(rank);
        if (slot.status == OpStatus::kAborted) {
            throw CommError(format("%s: rank %d: rank %d refused the operation: %s",
                                   op_name(signature_.kind), config.rank, rank, slot.message),
                            rank);
        }
    }
    const OpSignature& first = of(0).signature;
    for (int32_t rank = 1; rank < config.num_ranks; ++rank) {
        check_same_signature(first, 0, of(rank).signature, rank);
    }
}

int32_t Round::max_tokens() const {
    int32_t most = 0;
    for (int32_t rank = 0; rank < endpoint_.config().num_ranks; ++rank) {
        most = std::max(most, of(rank).num_tokens);
    }
    return most;
}

CountTable Round::counts() const {
    const EndpointConfig& config = endpoint_.config();
    CountTable table;
    for (int32_t rank = 0; rank < config.num_ranks; ++rank) {
        const int32_t* from = counts_of(const_cast<Announcement&>(of(rank)));
        RowCounts counts;
        counts.per_rank.assign(from, from + config.num_ranks);
        from += config.num_ranks;
        counts.per_node.assign(from, from + config.num_nodes());
        from += config.num_nodes();
        counts.per_expert.assign(from, from + config.num_experts);
        table.ranks.push_back(std::move(counts));
    }
    return table;
}

}  // namespace deepcomm::cpu
