// SPDX-License-Identifier: Apache-2.0
// The emulated address space and, for every word of it, who touched it last: bounds, uninitialised
// reads and data races. Values live in ordinary memory; this file owns their shadow.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "emu/clock.hpp"
#include "emu/types.hpp"

namespace deepcomm::emu {

/// How a word was accessed: plainly, or by a strong operation of some scope.
enum class Access : uint8_t { kWeak, kStrongBlock, kStrongGpu, kStrongSys };

constexpr Access strong_access(Scope scope) {
    return static_cast<Access>(static_cast<int>(scope) + 1);
}
constexpr Scope scope_of(Access access) { return static_cast<Scope>(static_cast<int>(access) - 1); }

enum class Proxy : uint8_t { kGeneric, kAsync };

/// Who accesses memory, when, and what it knows. Actors are threads and asynchronous agents.
struct Actor {
    int id;
    uint32_t epoch;
    const Knowledge* know;
    Access access;
    Proxy proxy;
};

class Memory {
  public:
    /// Forgets everything.
    void reset(bool allow_foreign);
    /// Places a new region; names are for messages.
    size_t alloc(int rank, const std::string& name, size_t num_bytes, bool define_zero);
    /// Makes a region's contents undefined again and forgets its accesses (shared memory reuse).
    void recycle(size_t offset, size_t num_bytes);
    void define(size_t offset, size_t num_bytes);
    /// Makes any later access an error; the addresses are not used again.
    void free(size_t offset);
    /// Takes bytes that the host has written: defined, and ordered before whatever runs next.
    void take_host_write(size_t offset, size_t num_bytes);

    /// Offset of address in the emulated space; for other memory kForeign plus the address where
    /// the run allows that, else kOutside.
    size_t offset_of(const void* address) const {
        const size_t offset = static_cast<size_t>(static_cast<const char*>(address) - base_);
        if (offset < num_used_) return offset;
        const auto number = reinterpret_cast<size_t>(address);
        const bool is_foreign = allow_foreign_ && offset >= kArenaBytes && number < kForeign;
        return is_foreign ? kForeign + number : kOutside;
    }
    char* at(size_t offset) const {
        return is_foreign(offset) ? reinterpret_cast<char*>(offset - kForeign) : base_ + offset;
    }
    /// Whether it is memory of the process that is not emulated, such as a tensor of the host. It
    /// counts as defined, and only accesses of kernels that run at the same time race: whoever owns
    /// it may use it otherwise, or give it back, once a kernel has ended.
    static bool is_foreign(size_t offset) { return offset >= kForeign && offset != kOutside; }
    bool is_in_arena(const void* address) const {
        return static_cast<size_t>(static_cast<const char*>(address) - base_) < kArenaBytes;
    }
    size_t num_used() const { return num_used_; }

    /// Reports races, accesses out of bounds and reads of undefined bytes, and records the access.
    void check_read(const Actor& actor, size_t offset, size_t num_bytes);
    void check_write(const Actor& actor, size_t offset, size_t num_bytes);

    /// For copies: they may carry undefined bytes (padding), which stay undefined.
    void check_copy_read(const Actor& actor, size_t offset, size_t num_bytes,
                         std::vector<uint8_t>* defined);
    void check_copy_write(const Actor& actor, size_t offset, const std::vector<uint8_t>& defined);

    /// For a host that reads, knowing so much.
    void check_host_read(const Knowledge& know, size_t offset, size_t num_bytes);
    void check_host_read_of_region(const Knowledge& know, size_t offset);

    /// Fails unless the whole range lies inside one region.
    void check_bounds(const char* what, size_t offset, size_t num_bytes) const;

    void set_mbarrier(size_t offset, bool is_mbarrier);

    /// "r1:recv+0x40".
    std::string describe(size_t offset) const;
    int rank_of(size_t offset) const;

    static constexpr size_t kOutside = ~size_t{0};
    static constexpr size_t kForeign = size_t{1} << 62;  ///< above every address of the process

  private:
    enum class State : uint8_t { kUnaddressable, kUndefined, kDefined, kMbarrier, kSplit };

    struct Cell {
        uint32_t writer = 0;  ///< actor id + 1; 0: the host
        uint32_t write_epoch = 0;
        uint32_t reader[2] = {0, 0};
        uint32_t read_epoch[2] = {0, 0};
        Access write_access = Access::kWeak;
        Access read_access[2] = {Access::kWeak, Access::kWeak};
        State state = State::kUnaddressable;
    };
    struct Region {
        std::string name;
        int rank;
        size_t begin;
        size_t end;
    };

    using Page = std::array<Cell, 1024>;
    struct CachedPage {
        size_t key = 0;  ///< offset / page size; no page of the host has 0
        Page* page = nullptr;
    };

    Cell& cell_at(size_t offset) {
        return is_foreign(offset) ? foreign_cell_at(offset) : cells_[offset / kWord];
    }
    Cell& foreign_cell_at(size_t offset);
    static void forget_ended(Cell& cell);
    template <typename Visit>
    void for_each_cell(size_t offset, size_t num_bytes, Visit&& visit);
    std::array<Cell, 4>& split(Cell& cell);
    void check_state(const Actor& actor, const Cell& cell, size_t offset, bool is_read) const;
    void check_against_write(const Actor& actor, const Cell& cell, size_t offset,
                             const char* what) const;
    void check_against_reads(const Actor& actor, const Cell& cell, size_t offset) const;
    void record_read(const Actor& actor, Cell& cell);
    bool knows(const Actor& actor, uint32_t other, uint32_t epoch, bool is_write) const;
    static bool is_morally_strong(const Actor& actor, int other_id, Access other);
    const Region* find_region(size_t offset) const;

    static constexpr size_t kArenaBytes = size_t{4} << 30;
    static constexpr size_t kWord = 4;
    static constexpr size_t kAlign = 128;
    static constexpr size_t kGuardBytes = 128;
    static constexpr int kRecentPagesLog2 = 10;

    char* base_ = nullptr;
    size_t num_used_ = 0;
    bool allow_foreign_ = false;
    std::vector<Cell> cells_;  ///< one a 4-byte word
    std::vector<std::array<Cell, 4>> split_cells_;
    std::vector<Region> regions_;
    std::unordered_map<size_t, std::unique_ptr<Page>> foreign_pages_;  ///< by offset / page size
    std::array<CachedPage, 1 << kRecentPagesLog2> recent_pages_;       ///< by a hash of the key
};

}  // namespace deepcomm::emu
