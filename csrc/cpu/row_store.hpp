// SPDX-License-Identifier: Apache-2.0
// Stores rows of one dispatch, with their metadata, in the landing areas of this node's ranks: for
// the rank whose tokens they are, and for the rail peer that forwards them. Slots are given.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/rows.hpp"
#include "layout/token_record.hpp"

namespace deepcomm::cpu {

/// The landing area of one rank of this node.
struct LandingArea {
    std::byte* rows;
    std::byte* scales;
    int32_t* topk_idx;
    int32_t* source_token;
    float* topk_weights;
    bool direct;  ///< rows go to their place in the receive layout, else they are in TOKEN order
    int64_t num_slots;  ///< TOKEN rows that fit
};

/// What all rows of a dispatch have in common.
struct StoreFormat {
    RowFormat row;
    int32_t num_topk;
    RecvLayout recv_layout;
    int64_t capacity;  ///< -1: none
    bool has_weights;

    int64_t metadata_bytes() const { return row.scale_bytes + num_topk * (has_weights ? 8 : 4); }
    int64_t bytes() const { return row.row_bytes + metadata_bytes(); }
};

/// Tokens [first_token, ...) of a tensor, or of records, which are strided just as well.
struct TokenRows {
    RowInput input;
    const std::byte* topk_weights;  ///< or null
    int64_t weights_stride;         ///< bytes
    int64_t first_token;

    static TokenRows of_records(const layout::TokenRecord& format, const StoreFormat& rows,
                                const std::byte* records, int64_t first_token);
    const float* weights(int64_t token) const;
};

class RowStore {
  public:
    RowStore(Endpoint& endpoint, const StoreFormat& format)
        : endpoint_(endpoint), format_(format) {}

    void add_area(const LandingArea& area) { areas_.push_back(area); }
    const LandingArea& area(int32_t local) const { return areas_[static_cast<size_t>(local)]; }
    const StoreFormat& format() const { return format_; }
    /// Writes rows past the caches from now on.
    void set_stream(bool stream) { stream_ = stream; }

    /// Stores tokens [begin, end) of routing on the ranks of this node.
    void store(const Routing& routing, int64_t begin, int64_t end, const TokenRows& rows);

  private:
    /// Calls body with each landing area of this node that has room for the token, and its slot.
    template <typename Body>
    void for_each_here(const Routing& routing, int64_t token, Body&& body) const;
    /// Adds where the row of a token goes.
    void find_places(const Routing& routing, int64_t token, std::vector<std::byte*>& places) const;
    void find_copies(const LandingArea& area, int32_t rank, const Routing& routing, int64_t token,
                     std::vector<std::byte*>& places) const;
    /// Stores what goes beside the row of a token.
    void store_beside(const Routing& routing, int64_t token, const std::byte* scales,
                      const float* weights) const;
    void store_metadata(const LandingArea& area, const Destination& to, const int32_t* ids,
                        const float* weights) const;
    void copy_row(std::byte* dst, const std::byte* row) const;
    void count_written(const Routing& routing, int64_t begin, int64_t end);
    int64_t bytes_written(const Routing& routing, int64_t token, const Destination& to) const;

    Endpoint& endpoint_;
    StoreFormat format_;
    std::vector<LandingArea> areas_;
    bool stream_ = false;
};

}  // namespace deepcomm::cpu
