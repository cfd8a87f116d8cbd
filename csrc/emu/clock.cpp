// SPDX-License-Identifier: Apache-2.0
#include "emu/clock.hpp"

#include <cstring>

namespace deepcomm::emu {

Clock::Pool& Clock::pool() {
    // Clocks come and go at every strong operation. Never destroyed: static clocks end later.
    static auto* pool = new Pool;
    return *pool;
}

/// One that is free, or a new one; all but its number of owners is left to the caller.
template <typename T>
static T* take(std::vector<T*>& pool) {
    if (pool.empty()) return new T{1, {}};
    T* taken = pool.back();
    pool.pop_back();
    taken->num_owners = 1;
    return taken;
}

void Clock::release_chunk(Chunk* chunk) {
    if (chunk && --chunk->num_owners == 0) pool().chunks.push_back(chunk);
}

void Clock::release() {
    if (node_ && --node_->num_owners == 0) {
        for (Chunk* chunk : node_->chunks) release_chunk(chunk);
        node_->chunks.clear();
        pool().nodes.push_back(node_);
    }
    node_ = nullptr;
}

std::vector<Clock::Chunk*>& Clock::writable_chunks(size_t min_size) {
    if (!node_) {
        node_ = take(pool().nodes);
    } else if (node_->num_owners > 1) {
        Node* copy = take(pool().nodes);
        copy->chunks = node_->chunks;
        for (Chunk* chunk : copy->chunks) {
            if (chunk) ++chunk->num_owners;
        }
        --node_->num_owners;
        node_ = copy;
    }
    if (node_->chunks.size() < min_size) node_->chunks.resize(min_size, nullptr);
    return node_->chunks;
}

uint32_t* Clock::writable_epochs(size_t chunk_idx) {
    Chunk*& chunk = writable_chunks(chunk_idx + 1)[chunk_idx];
    if (!chunk || chunk->num_owners > 1) {
        Chunk* copy = take(pool().chunks);
        if (chunk) {
            std::memcpy(copy->epochs, chunk->epochs, sizeof copy->epochs);
            --chunk->num_owners;
        } else {
            std::memset(copy->epochs, 0, sizeof copy->epochs);
        }
        chunk = copy;
    }
    return chunk->epochs;
}

void Clock::raise(size_t index, uint32_t epoch) {
    if ((*this)[index] >= epoch) return;
    writable_epochs(index / kChunkEntries)[index % kChunkEntries] = epoch;
}

void Clock::replace_chunk(size_t chunk_idx, Chunk* chunk) {
    ++chunk->num_owners;
    Chunk*& mine = writable_chunks(chunk_idx + 1)[chunk_idx];
    release_chunk(mine);
    mine = chunk;
}

/// Takes the other's chunk where that holds the result, so that later joins find them equal.
void Clock::join_chunk(size_t chunk_idx, Chunk* other) {
    const Chunk* mine = chunk_idx < node_->chunks.size() ? node_->chunks[chunk_idx] : nullptr;
    if (!other || mine == other) return;
    if (!mine) return replace_chunk(chunk_idx, other);
    // Signs of differences, as every x86-64 compares vectors of them; epochs stay below 2^31.
    uint32_t behind = 0;
    uint32_t ahead = 0;
    for (size_t i = 0; i < kChunkEntries; ++i) {
        behind |= mine->epochs[i] - other->epochs[i];
        ahead |= other->epochs[i] - mine->epochs[i];
    }
    if (!(behind >> 31)) return;
    if (!(ahead >> 31)) return replace_chunk(chunk_idx, other);
    uint32_t* target = writable_epochs(chunk_idx);
    const uint32_t* source = other->epochs;
    for (size_t i = 0; i < kChunkEntries; ++i) {
        const uint32_t difference = source[i] - target[i];
        target[i] += difference & ((difference >> 31) - 1);  // unless it is negative
    }
}

void Clock::join(const Clock& other) {
    if (!other.node_ || other.node_ == node_) return;
    if (!node_) {
        *this = other;
        return;
    }
    const std::vector<Chunk*>& from = other.node_->chunks;
    for (size_t i = 0; i < from.size(); ++i) join_chunk(i, from[i]);
    if (node_->chunks == from) *this = other;
}

}  // namespace deepcomm::emu
