// SPDX-License-Identifier: Apache-2.0
// Rows as they go in (input tensors, cast on the way where asked) and as they come out (the receive
// layouts). No synchronisation here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/endpoint.hpp"
#include "cpu/routing.hpp"
#include "layout/token_record.hpp"

namespace deepcomm::cpu {

/// A row's form on its way.
struct RowFormat {
    DType dtype = DType::kBf16;
    ScaleFormat scale_format = ScaleFormat::kNone;
    int32_t hidden = 0;
    int64_t row_bytes = 0;
    int64_t scale_bytes = 0;  ///< bytes of one row's scales; packed UE8M0 is padded to whole words

    static RowFormat make(DType dtype, ScaleFormat scale_format, int32_t hidden);
    int64_t scale_words() const { return scale_bytes / 4; }
};

/// The rows a user gave: a strided tensor, FP8 with scales, or to be cast to FP8 when read.
struct RowInput {
    const std::byte* rows = nullptr;
    int64_t row_stride = 0;  ///< bytes
    const std::byte* scales = nullptr;
    int64_t scale_stride = 0;  ///< bytes
    DType dtype = DType::kBf16;
    bool quantize = false;
};

struct RowView {
    const std::byte* row;
    const std::byte* scales;  ///< null unless FP8
};

/// Reads rows of one input in their travelling form; one reader a thread (it owns the cast row).
class RowReader {
  public:
    RowReader(const RowInput& input, const RowFormat& format, const RowOps& ops);
    /// Where the row is cast, it is written to copies, too; they are ignored otherwise.
    RowView read(int64_t token, const CastCopies& copies = {});

  private:
    const RowInput& input_;
    const RowFormat& format_;
    const RowOps& ops_;
    std::vector<std::byte> row_;
    std::vector<std::byte> scales_;
};

/// One token to be packed into a record.
struct PackedToken {
    RowView view;
    const int32_t* topk_idx;
    const float* topk_weights;  ///< or null
    int32_t num_topk;
};

void pack_record(const layout::TokenRecord& format, const PackedToken& token, std::byte* record);

/// One expert's copy of a received row.
struct ExpertRow {
    int32_t position;  ///< row of the flattened receive tensor
    int32_t column;    ///< k of topk_idx
};

/// What this rank received, in TOKEN order, and where the expert layouts put it.
struct Received {
    int32_t num_rows = 0;
    int32_t num_topk = 0;
    std::vector<int32_t> first_row;         ///< [R + 1] rows of each source
    std::vector<int32_t> topk_idx;          ///< [N, K] local expert ids, -1 elsewhere
    std::vector<float> topk_weights;        ///< [N, K] or empty
    std::vector<int32_t> source_token;      ///< [N] token index at its source
    std::vector<int32_t> counts;            ///< [L] rows delivered per expert
    std::vector<int32_t> offsets;           ///< EXPERT: [L + 1], clipped to the capacity
    std::vector<int32_t> first_expert_row;  ///< [N + 1], index into expert_rows; expert layouts
    std::vector<ExpertRow> expert_rows;     ///< per row, local experts ascending; delivered ones
    int64_t block_rows = 0;                 ///< EXPERT_PADDED: rows of an expert's block
    int64_t out_rows = 0;    ///< rows of the receive tensor (capacity, or exact with padding)
    int64_t num_recv = 0;    ///< what num_recv_tokens says
    bool lost_here = false;  ///< rows did not fit the capacity
};

/// Fills the fields of received that follow from its rows and ids.
void place_rows(const EndpointConfig& config, RecvLayout recv_layout, int64_t capacity,
                const std::vector<int32_t>& full_offsets, Received& received);

/// Where the outputs go; null members are not wanted.
struct DeliverTarget {
    std::byte* x = nullptr;  ///< null: the rows are in place
    std::byte* scales = nullptr;
    void* topk_idx = nullptr;
    bool topk_idx_is_int64 = false;
    float* topk_weights = nullptr;
    int32_t* counts = nullptr;
    int32_t* offsets = nullptr;
    int32_t* num_recv_tokens = nullptr;
    bool* overflow = nullptr;
    bool zero_padding = false;
    bool stream = false;
};

/// Rows that have arrived, and the layout that they are wanted in.
struct Delivery {
    const RowFormat& format;
    RecvLayout recv_layout;
    const Received& received;
    const std::vector<RowView>& views;  ///< in TOKEN order
    bool overflow;
};

/// Writes the rows and their metadata into the receive layout.
void deliver(const Delivery& delivery, const DeliverTarget& target, const RowOps& ops,
             ThreadPool& pool);

/// Zeroes the rows of x [out_rows] that hold no token (TOKEN and EXPERT).
void zero_padding_rows(const RowFormat& format, RecvLayout recv_layout, const Received& received,
                       std::byte* x);

/// Rows below which threads do not pay.
constexpr int64_t kGrainRows = 8;
/// Bytes of one operation above which rows are written past the caches.
constexpr int64_t kStreamBytes = 4 << 20;

}  // namespace deepcomm::cpu
