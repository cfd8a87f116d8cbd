// SPDX-License-Identifier: Apache-2.0
// Packets: 16 bytes stored at once, which bring data and say themselves that it has arrived. PROTOCOLS.md:
// low latency.
#pragma once

#include "kernels/low_latency/common.cuh"

namespace deepcomm::kernels::low_latency {

DEEPCOMM_DEVICE Vec128* packets_at(unsigned char* base, int64_t offset) {
    return reinterpret_cast<Vec128*>(base + offset);
}

/// Where a row's payload begins, of the heads before it: one for each of a token's columns.
DEEPCOMM_DEVICE Vec128* payload_of(const LowLatencyParams& params, Vec128* heads) {
    return heads + params.map.num_topk;
}

/// Word part of a packet with a tag, without an array in memory.
DEEPCOMM_DEVICE uint32_t payload_word(const Vec128& packet, int32_t part) {
    return part == 0 ? packet.words[0] : part == 1 ? packet.words[1] : packet.words[2];
}

/// Polls one packet until it carries the tag.
DEEPCOMM_DEVICE Arrival wait_packet(const LowLatencyParams& params, const device::WaitSite& site,
                                    const Vec128* address, uint32_t tag, Vec128* packet) {
    return wait_for(params, site, tag, address, [&]() -> device::Observed {
        *packet = device::ld_relaxed_sys(address);
        return {packet->words[3], packet->words[3] == tag};
    });
}

/// The same for a packet without which the operation fails in any case. False: leave.
DEEPCOMM_DEVICE bool must_arrive(const LowLatencyParams& params, const device::WaitSite& site,
                                 const Vec128* address, uint32_t tag, Vec128* packet) {
    const device::WaitContext context = wait_context(params, site.role);
    return device::wait_until(context, site, tag, address, [&]() -> device::Observed {
        *packet = device::ld_relaxed_sys(address);
        return {packet->words[3], packet->words[3] == tag};
    });
}

/// Packets that bring three words and the tag of their operation. They are left as they are.
struct Tagged {
    static constexpr int kWords = static_cast<int>(layout::kPacketWords);

    static DEEPCOMM_DEVICE Vec128 pack(const uint32_t* words, uint32_t tag) {
        return {{words[0], words[1], words[2], tag}};
    }
    static DEEPCOMM_DEVICE uint32_t word(const Vec128& packet, int32_t part) {
        return packet.words[part];
    }
    /// The tag of this turn or another one.
    static DEEPCOMM_DEVICE uint32_t observe(const Vec128& packet, uint32_t) {
        return packet.words[3];
    }
    static DEEPCOMM_DEVICE void clear(Vec128*) {}
};

/// Packets that bring four words, none of which is 0 on the way: what reads them leaves zeros behind, so
/// that each word says that it is here. Bits travel inverted; all ones, which nothing but a NaN has, become
/// another NaN.
struct Dense {
    static constexpr int kWords = static_cast<int>(layout::kDenseWords);

    static DEEPCOMM_DEVICE Vec128 pack(const uint32_t* words, uint32_t) {
        return {{encode(words[0]), encode(words[1]), encode(words[2]), encode(words[3])}};
    }
    static DEEPCOMM_DEVICE uint32_t encode(uint32_t word) { return word == ~0u ? 1u << 31 : ~word; }
    static DEEPCOMM_DEVICE uint32_t word(const Vec128& packet, int32_t part) {
        return ~packet.words[part];
    }
    /// The tag if all of it is here, else 0.
    static DEEPCOMM_DEVICE uint32_t observe(const Vec128& packet, uint32_t tag) {
        const bool is_here = packet.words[0] != 0 && packet.words[1] != 0 && packet.words[2] != 0 &&
                             packet.words[3] != 0;
        return is_here ? tag : 0;
    }
    static DEEPCOMM_DEVICE void clear(Vec128* packet) { device::st_relaxed_sys(packet, Vec128{}); }
};

/// Of the payload of rows: on one node what reads a packet is alone in that, and clears it.
template <bool kHasNodes>
struct PayloadFormat {
    using Type = Dense;
};

template <>
struct PayloadFormat<true> {
    using Type = Tagged;
};

/// A row of packets that threads take in turns, stride apart.
struct PacketRange {
    Vec128* packets;
    int32_t stride;
    int32_t num;
};

/// Packets first, first + stride, ... of a range: all loads fly before the first is tested.
template <typename Format, int kCount>
struct PacketBatch {
    Vec128 packets[kCount];

    DEEPCOMM_DEVICE void load(const PacketRange& range, int32_t first) {
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kCount; ++i) {
            const int32_t index = first + i * range.stride;
            if (index < range.num) packets[i] = device::ld_relaxed_sys(range.packets + index);
        }
    }

    /// Whether packet i, which a load has brought, is not of this turn yet.
    DEEPCOMM_DEVICE bool is_missing(int32_t i, const PacketRange& range, int32_t first,
                                    uint32_t tag) const {
        return first + i * range.stride < range.num && Format::observe(packets[i], tag) != tag;
    }

    /// Loads those again that had not arrived: all loads fly before the first is tested.
    DEEPCOMM_DEVICE void reload(const PacketRange& range, int32_t first, uint32_t tag) {
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kCount; ++i) {
            const Vec128* packet = range.packets + first + i * range.stride;
            if (is_missing(i, range, first, tag)) packets[i] = device::ld_relaxed_sys(packet);
        }
    }

    /// Polls those that had not arrived, all of them together: one after the other, each would cost
    /// the latency of a load, although it has arrived meanwhile.
    DEEPCOMM_DEVICE Arrival wait(const LowLatencyParams& params, const device::WaitSite& site,
                                 const PacketRange& range, int32_t first, uint32_t tag) {
        DEEPCOMM_NO_UNROLL
        while (true) {
            int32_t awaited = kCount;
            DEEPCOMM_UNROLL
            for (int32_t i = kCount - 1; i >= 0; --i) {
                if (is_missing(i, range, first, tag)) awaited = i;
            }
            if (awaited == kCount) return Arrival::kHere;
            const Vec128* address = range.packets + first + awaited * range.stride;
            const Arrival arrival = wait_for(params, site, tag, address, [&]() -> device::Observed {
                reload(range, first, tag);
                uint32_t observed = tag;
                DEEPCOMM_UNROLL
                for (int32_t i = 0; i < kCount; ++i) {
                    if (i == awaited) observed = Format::observe(packets[i], tag);
                }
                return {observed, observed == tag};
            });
            if (arrival != Arrival::kHere) return arrival;
        }
    }

    /// Makes room for the slot's next operation, once all of them are here.
    DEEPCOMM_DEVICE void clear(const PacketRange& range, int32_t first) const {
        DEEPCOMM_UNROLL
        for (int32_t i = 0; i < kCount; ++i) {
            const int32_t index = first + i * range.stride;
            if (index < range.num) Format::clear(range.packets + index);
        }
    }
};

/// Stores packets first, first + threads, ... of a row.
template <typename Spec, int kCount>
DEEPCOMM_DEVICE void store_packets(const PacketBatch<typename Spec::Format, kCount>& batch,
                                   int32_t first, Vec128* packets) {
    DEEPCOMM_UNROLL
    for (int32_t i = 0; i < kCount; ++i) {
        const int32_t index = first + i * Spec::kNumThreads;
        if (index < Spec::kPackets) device::st_relaxed_sys(packets + index, batch.packets[i]);
    }
}

}  // namespace deepcomm::kernels::low_latency
