// SPDX-License-Identifier: Apache-2.0
// Owner of one POSIX shared memory mapping: creation, reservation of real memory, unlinking.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace deepcomm::cpu {

class Segment {
  public:
    struct Range {
        int64_t offset;
        int64_t num_bytes;
    };

    /// Removes this user's names whose owners died before all ranks had connected.
    static void remove_stale();
    /// Creates a segment with a fresh name and num_bytes of address range; nothing is reserved yet.
    /// Removes stale names first.
    static std::shared_ptr<Segment> create(int64_t num_bytes);
    /// Maps a peer's segment; throws CommError where it cannot be opened.
    static std::shared_ptr<Segment> open(const std::string& name, int64_t num_bytes);
    ~Segment();
    Segment(const Segment&) = delete;
    Segment& operator=(const Segment&) = delete;

    const std::string& name() const { return name_; }
    std::byte* data() const { return data_; }
    int64_t num_bytes() const { return num_bytes_; }
    /// Bytes reserved so far.
    int64_t reserved_bytes() const { return reserved_bytes_; }

    /// Backs a range with memory, so that touching it cannot fail later. Returns false where shared
    /// memory is full.
    bool try_reserve(Range range);
    /// The same for all ranges or none, throwing CommError with the sizes and the remedy.
    void reserve(const std::vector<Range>& ranges);
    /// Removes the name: the memory then lives as long as its mappings. Idempotent.
    void unlink();

  private:
    void release(Range range);
    Segment(std::string name, int fd, int64_t num_bytes, bool owner);

    std::string name_;
    int fd_;
    int64_t num_bytes_;
    int64_t reserved_bytes_ = 0;
    bool linked_;
    std::byte* data_;
};

}  // namespace deepcomm::cpu
