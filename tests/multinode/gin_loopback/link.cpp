// SPDX-License-Identifier: Apache-2.0
#include "link.hpp"

#include <cstring>

#include "log.hpp"

namespace loopback {

void Outbound::advance(Lane* lane) {
    complete();
    if (is_copying_) {
        if (!lane->is_done()) {
            return;
        }
        is_copying_ = false;
        publish();
    }
    const uint64_t begin = tail_;
    has_copied_ = false;
    while (!waiting_.empty() && tail_ - begin < ring_.batch_bytes() &&
           stage(waiting_.front(), lane)) {
    }
    if (has_copied_) {
        lane->mark();
        is_copying_ = true;
    } else if (tail_ != begin) {
        publish();
    }
}

void Outbound::publish() {
    // ORDER: pairs with the acquire in Inbound::take; the copies into the ring have ended
    ring_.control->tail.store(tail_, std::memory_order_release);
}

void Outbound::complete() {
    const uint64_t head = ring_.control->head.load(std::memory_order_relaxed);
    while (!unconsumed_.empty() && unconsumed_.front().first <= head) {
        unconsumed_.front().second->is_done = true;
        unconsumed_.pop_front();
    }
}

void Outbound::drop() {
    waiting_.clear();
    unconsumed_.clear();
}

bool Outbound::reserve(uint64_t num_bytes) {
    // ORDER: pairs with the release in Inbound::finish; what is overwritten has been read
    const uint64_t head = ring_.control->head.load(std::memory_order_acquire);
    const uint64_t free_bytes = ring_.capacity - (tail_ - head);
    const uint64_t until_end = ring_.until_end(tail_);
    if (num_bytes <= until_end) {
        return num_bytes <= free_bytes;
    }
    if (until_end + num_bytes > free_bytes) {
        return false;
    }
    Entry& filler = ring_.entry(tail_);
    filler = {};
    filler.kind = Kind::kWrap;
    filler.num_bytes = until_end - sizeof(Entry);
    tail_ += until_end;
    return true;
}

bool Outbound::stage(Work& work, Lane* lane) {
    const uint64_t num_bytes = std::min(work.num_bytes - work.staged, ring_.max_payload_bytes());
    if (!reserve(Ring::bytes_of(num_bytes))) {
        return false;
    }
    Entry& entry = ring_.entry(tail_);
    entry = work.entry;
    entry.num_bytes = num_bytes;
    entry.offset += work.staged;
    const bool is_last = work.staged + num_bytes == work.num_bytes;
    if (!is_last) {
        entry.operation = 0;
        entry.request = 0;
    }
    if (num_bytes > 0) {
        const char* const from = work.source->address + work.source_offset + work.staged;
        if (work.source->on_device) {
            lane->copy(ring_.payload(tail_), from, num_bytes);
            has_copied_ = true;
        } else {
            std::memcpy(ring_.payload(tail_), from, num_bytes);
        }
    }
    tail_ += Ring::bytes_of(num_bytes);
    work.staged += num_bytes;
    if (is_last) {
        if (work.request != nullptr) {
            unconsumed_.emplace_back(tail_, std::move(work.request));
        }
        waiting_.pop_front();
    }
    return true;
}

void Inbound::advance(Lane* lane, Owner& owner) {
    if (is_copying_) {
        if (!lane->is_done()) {
            return;
        }
        is_copying_ = false;
        finish(owner);
    }
    const uint64_t begin = read_;
    has_copied_ = false;
    take(lane, owner);
    if (has_copied_) {
        lane->mark();
        is_copying_ = true;
    } else if (read_ != begin) {
        finish(owner);
    }
}

void Inbound::take(Lane* lane, Owner& owner) {
    // ORDER: pairs with the release in Outbound::publish
    const uint64_t tail = ring_.control->tail.load(std::memory_order_acquire);
    const uint64_t begin = read_;
    while (read_ != tail && read_ - begin < ring_.batch_bytes() && !last_) {
        const Entry& entry = ring_.entry(read_);
        if (!accept(entry, read_, lane, owner)) {
            if (refused_ != read_) {
                refused_ = read_;
                log(kCalls, "from %d: memory %llu or %llu is not registered yet", source_,
                    static_cast<unsigned long long>(entry.region),
                    static_cast<unsigned long long>(entry.other_region));
            }
            return;
        }
        read_ += Ring::bytes_of(entry.num_bytes);
    }
}

bool Inbound::accept(const Entry& entry, uint64_t position, Lane* lane, Owner& owner) {
    const bool has_place = entry.kind != Kind::kWrap && entry.region != kNoRegion;
    const uint64_t place_bytes = entry.kind == Kind::kGet ? entry.value : entry.num_bytes;
    const Region* const region =
        has_place ? owner.find(entry.region, entry.offset, place_bytes) : nullptr;
    const bool has_signal = entry.operation != 0;
    if ((has_place && region == nullptr) ||
        (has_signal &&
         owner.find(entry.other_region, entry.other_offset, sizeof(uint64_t)) == nullptr)) {
        return false;
    }
    if (entry.kind == Kind::kGet || has_signal || entry.request != 0) {
        last_ = entry;
    }
    if (entry.kind == Kind::kWrap || entry.kind == Kind::kGet || entry.num_bytes == 0) {
        return true;
    }
    char* const to = region->address + entry.offset;
    if (region->on_device) {
        lane->copy(to, ring_.payload(position), entry.num_bytes);
        has_copied_ = true;
    } else {
        std::memcpy(to, ring_.payload(position), entry.num_bytes);
    }
    return true;
}

void Inbound::finish(Owner& owner) {
    if (last_) {
        const Entry entry = *last_;
        last_.reset();
        if (entry.kind == Kind::kGet) {
            owner.reply(source_, entry);
        } else if (entry.kind == Kind::kReply) {
            owner.complete(entry.request);
        } else {
            owner.signal(entry);
        }
    }
    // ORDER: pairs with the acquire in Outbound::reserve; the copies out of the ring have ended
    ring_.control->head.store(read_, std::memory_order_release);
}

}  // namespace loopback
