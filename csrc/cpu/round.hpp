// SPDX-License-Identifier: Apache-2.0
// The opening of every high-throughput operation: each rank announces to all what it asks for, and
// learns from all before payload moves. An argument error travels here, so that nobody is left
// waiting. Announcements of other nodes are relayed by the rail peer (transport: Python).
#pragma once

#include <memory>
#include <string>

#include "cpu/routing.hpp"

namespace deepcomm::cpu {

/// What a rank adds to its announcement.
struct AnnouncementBody {
    int32_t num_tokens = 0;
    int64_t rows_offset = 0;
    int64_t rows_reserved = 0;
    int32_t generation = -1;
    const RowCounts* counts = nullptr;
};

class Round {
  public:
    /// Takes the next epoch of the endpoint.
    Round(Endpoint& endpoint, const OpSignature& signature);

    uint64_t epoch() const { return epoch_; }
    const OpSignature& signature() const { return signature_; }
    void announce(const AnnouncementBody& body);
    /// Announces that this rank refuses the operation; the caller raises after the relays.
    void abort(const std::string& message);

    /// This rank's announcement as bytes for the rail, and the way in for those of other nodes.
    std::string serialized() const;
    void relay(int32_t node, const std::string& bytes);

    /// Waits for the announcements of all ranks. Throws CommError where one refused, ConfigMismatch
    /// where they differ; the epoch is then finished and the endpoint usable. Returns the largest
    /// number of tokens that any rank announced.
    int32_t wait_all();
    int32_t max_tokens() const;
    CountTable counts() const;
    const Announcement& of(int32_t rank) const { return endpoint_.announcement(rank, epoch_); }

  private:
    Announcement& prepare(OpStatus status);
    void publish(Announcement& slot);
    void check_all() const;

    Endpoint& endpoint_;
    OpSignature signature_;
    uint64_t epoch_;
};

}  // namespace deepcomm::cpu
