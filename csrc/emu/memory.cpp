// SPDX-License-Identifier: Apache-2.0
#include "emu/memory.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "emu/machine.hpp"

namespace deepcomm::emu {

namespace {
constexpr int kPoisonByte = 0xEE;
}  // namespace

void Memory::reset(bool allow_foreign) {
    allow_foreign_ = allow_foreign;
    if (!base_) {
        void* base = mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (base == MAP_FAILED) {
            std::fprintf(stderr, "emulator: cannot reserve %zu bytes\n", kArenaBytes);
            std::abort();
        }
        base_ = static_cast<char*>(base);
    }
    num_used_ = 0;
    cells_.clear();
    split_cells_.clear();
    regions_.clear();
    foreign_pages_.clear();
    recent_pages_.fill({});
}

size_t Memory::alloc(int rank, const std::string& name, size_t num_bytes, bool define_zero) {
    const size_t begin = num_used_;
    const size_t end = begin + num_bytes;
    const size_t next = (end + kGuardBytes + kAlign - 1) / kAlign * kAlign;
    if (next > kArenaBytes) fail("emulated memory is full at %s (%zu bytes)", name.c_str(), next);
    num_used_ = next;
    cells_.resize(next / kWord);
    regions_.push_back({name, rank, begin, end});
    recycle(begin, num_bytes);
    if (define_zero) {
        std::memset(at(begin), 0, num_bytes);
        define(begin, num_bytes);
    }
    return begin;
}

void Memory::recycle(size_t offset, size_t num_bytes) {
    std::memset(at(offset), kPoisonByte, num_bytes);
    Cell fresh;
    fresh.state = State::kUndefined;
    const size_t whole_words = num_bytes / kWord;
    std::fill_n(cells_.begin() + static_cast<long>(offset / kWord), whole_words, fresh);
    for (size_t byte = whole_words * kWord; byte < num_bytes; ++byte) {
        split(cells_[(offset + byte) / kWord])[byte % kWord].state = State::kUndefined;
    }
}

void Memory::define(size_t offset, size_t num_bytes) {
    for_each_cell(offset, num_bytes, [](Cell& cell, size_t) {
        if (cell.state == State::kUndefined) cell.state = State::kDefined;
    });
}

void Memory::free(size_t offset) {
    const Region* region = find_region(offset);
    for_each_cell(offset, region->end - offset, [](Cell& cell, size_t) { cell = Cell{}; });
}

void Memory::take_host_write(size_t offset, size_t num_bytes) {
    for_each_cell(offset, num_bytes, [](Cell& cell, size_t) {
        cell = Cell{};
        cell.state = State::kDefined;
    });
}

std::array<Memory::Cell, 4>& Memory::split(Cell& cell) {
    if (cell.state != State::kSplit) {
        split_cells_.push_back({cell, cell, cell, cell});
        cell.state = State::kSplit;
        cell.writer = static_cast<uint32_t>(split_cells_.size() - 1);
    }
    return split_cells_[cell.writer];
}

static void check_mapped(size_t address) {
    constexpr size_t kPageBytes = 4096;
    auto* page = reinterpret_cast<void*>(address / kPageBytes * kPageBytes);
    if (msync(page, kPageBytes, MS_ASYNC) == 0) return;
    fail("wild pointer: 0x%zx is memory of nobody", address);
}

Memory::Cell& Memory::foreign_cell_at(size_t offset) {
    const size_t key = offset / (kWord * std::tuple_size<Page>::value);
    // The heaps of threads begin at multiples of large powers of two: the low bits tell too little.
    CachedPage& recent = recent_pages_[key * 0x9E3779B97F4A7C15ull >> (64 - kRecentPagesLog2)];
    if (recent.key != key) {
        std::unique_ptr<Page>& page = foreign_pages_[key];
        if (!page) {
            check_mapped(offset - kForeign);
            page = std::make_unique<Page>();
            for (Cell& cell : *page) cell.state = State::kDefined;
        }
        recent = {key, page.get()};
    }
    return (*recent.page)[offset / kWord % std::tuple_size<Page>::value];
}

/// Accesses of ended kernels to memory of the host are past: see is_foreign.
void Memory::forget_ended(Cell& cell) {
    if (cell.writer && machine->has_ended(static_cast<int>(cell.writer) - 1, cell.write_epoch)) {
        cell.writer = 0;
    }
    for (int i = 0; i < 2; ++i) {
        const int reader = static_cast<int>(cell.reader[i]) - 1;
        if (reader >= 0 && machine->has_ended(reader, cell.read_epoch[i])) cell.reader[i] = 0;
    }
}

/// Visits the cells of a range: one a whole word, one a byte where a word is or becomes split.
template <typename Visit>
void Memory::for_each_cell(size_t offset, size_t num_bytes, Visit&& visit) {
    const bool is_hosts = is_foreign(offset);
    const auto visit_cell = [&](Cell& cell, size_t at_offset) {
        if (is_hosts) forget_ended(cell);
        visit(cell, at_offset);
    };
    const size_t end = offset + num_bytes;
    while (offset < end) {
        Cell& cell = cell_at(offset);
        const size_t word_end = std::min(end, (offset / kWord + 1) * kWord);
        if (word_end - offset == kWord && cell.state != State::kSplit) {
            visit_cell(cell, offset);
            offset = word_end;
            continue;
        }
        for (; offset < word_end; ++offset) visit_cell(split(cell)[offset % kWord], offset);
    }
}

bool Memory::is_morally_strong(const Actor& actor, int other_id, Access other) {
    if (actor.access == Access::kWeak || other == Access::kWeak) return false;
    return machine->includes(scope_of(actor.access), actor.id, other_id) &&
           machine->includes(scope_of(other), other_id, actor.id);
}

/// Whether an earlier access happened before the actor's. The asynchronous proxy needs a proxy
/// fence after generic writes, but not after generic reads, nor after other asynchronous copies.
bool Memory::knows(const Actor& actor, uint32_t other, uint32_t epoch, bool is_write) const {
    const int other_id = static_cast<int>(other) - 1;
    const bool is_thread = machine->is_thread(other_id);
    if (actor.proxy == Proxy::kGeneric && other_id == actor.id) return true;
    const bool needs_proxy_fence = actor.proxy == Proxy::kAsync && is_thread && is_write;
    const Clock& clock = needs_proxy_fence ? actor.know->proxied : actor.know->seen;
    return clock[static_cast<size_t>(other_id)] >= epoch;
}

void Memory::check_state(const Actor& actor, const Cell& cell, size_t offset, bool is_read) const {
    switch (cell.state) {
        case State::kDefined: return;
        case State::kUndefined:
            if (!is_read) return;
            fail("uninitialised: %s is read by %s before anything was written",
                 describe(offset).c_str(), machine->actor_name(actor.id).c_str());
        case State::kMbarrier:
            fail("mbarrier: %s is accessed as data by %s", describe(offset).c_str(),
                 machine->actor_name(actor.id).c_str());
        default:
            fail("out of bounds: %s of %s by %s", is_read ? "read" : "write",
                 describe(offset).c_str(), machine->actor_name(actor.id).c_str());
    }
}

static const char* scope_hint(Access one, Access other) {
    const bool are_strong = one != Access::kWeak && other != Access::kWeak;
    return are_strong ? " (both are strong, but a scope is too narrow)" : "";
}

void Memory::check_against_write(const Actor& actor, const Cell& cell, size_t offset,
                                 const char* what) const {
    if (cell.writer == 0 || knows(actor, cell.writer, cell.write_epoch, true)) return;
    const int writer = static_cast<int>(cell.writer) - 1;
    if (is_morally_strong(actor, writer, cell.write_access)) return;
    const bool seen = actor.know->seen[static_cast<size_t>(writer)] >= cell.write_epoch;
    fail("race: %s of %s by %s is unordered with the write by %s%s", what, describe(offset).c_str(),
         machine->actor_name(actor.id).c_str(), machine->actor_name(writer).c_str(),
         seen ? " (no proxy fence between them)" : scope_hint(actor.access, cell.write_access));
}

void Memory::check_against_reads(const Actor& actor, const Cell& cell, size_t offset) const {
    for (int i = 0; i < 2; ++i) {
        if (cell.reader[i] == 0 || knows(actor, cell.reader[i], cell.read_epoch[i], false))
            continue;
        const int reader = static_cast<int>(cell.reader[i]) - 1;
        if (is_morally_strong(actor, reader, cell.read_access[i])) continue;
        fail("race: write of %s by %s is unordered with the earlier read by %s%s",
             describe(offset).c_str(), machine->actor_name(actor.id).c_str(),
             machine->actor_name(reader).c_str(), scope_hint(actor.access, cell.read_access[i]));
    }
}

/// Keeps two readers a cell: one that the new reader knows is superseded, else chance decides.
void Memory::record_read(const Actor& actor, Cell& cell) {
    const auto id = static_cast<uint32_t>(actor.id + 1);
    int slot = -1;
    for (int i = 0; i < 2 && slot < 0; ++i) {
        if (cell.reader[i] == 0 || cell.reader[i] == id) slot = i;
    }
    for (int i = 0; i < 2 && slot < 0; ++i) {
        const bool is_weaker = cell.read_access[i] < actor.access;  // a weak read races with more
        if (!is_weaker && knows(actor, cell.reader[i], cell.read_epoch[i], false)) slot = i;
    }
    if (slot < 0) slot = static_cast<int>(machine->shadow_random.below(2));
    cell.reader[slot] = id;
    cell.read_epoch[slot] = actor.epoch;
    cell.read_access[slot] = actor.access;
}

void Memory::check_read(const Actor& actor, size_t offset, size_t num_bytes) {
    for_each_cell(offset, num_bytes, [&](Cell& cell, size_t at_offset) {
        check_state(actor, cell, at_offset, true);
        check_against_write(actor, cell, at_offset, "read");
        record_read(actor, cell);
    });
}

void Memory::check_write(const Actor& actor, size_t offset, size_t num_bytes) {
    for_each_cell(offset, num_bytes, [&](Cell& cell, size_t at_offset) {
        check_state(actor, cell, at_offset, false);
        check_against_write(actor, cell, at_offset, "write");
        check_against_reads(actor, cell, at_offset);
        cell = Cell{};
        cell.writer = static_cast<uint32_t>(actor.id + 1);
        cell.write_epoch = actor.epoch;
        cell.write_access = actor.access;
        cell.state = State::kDefined;
    });
}

void Memory::check_copy_read(const Actor& actor, size_t offset, size_t num_bytes,
                             std::vector<uint8_t>* defined) {
    defined->assign(num_bytes, 1);
    const size_t begin = offset;
    for_each_cell(offset, num_bytes, [&](Cell& cell, size_t at_offset) {
        check_state(actor, cell, at_offset, false);
        check_against_write(actor, cell, at_offset, "asynchronous read");
        record_read(actor, cell);
        if (cell.state != State::kUndefined) return;
        const bool is_byte = cell_at(at_offset).state == State::kSplit;
        std::fill_n(defined->begin() + static_cast<long>(at_offset - begin), is_byte ? 1 : kWord,
                    uint8_t{0});
    });
}

void Memory::check_copy_write(const Actor& actor, size_t offset,
                              const std::vector<uint8_t>& defined) {
    const size_t begin = offset;
    const auto mark = [&](Cell& cell, size_t at_offset) {
        check_state(actor, cell, at_offset, false);
        check_against_write(actor, cell, at_offset, "asynchronous write");
        check_against_reads(actor, cell, at_offset);
        cell = Cell{};
        cell.writer = static_cast<uint32_t>(actor.id + 1);
        cell.write_epoch = actor.epoch;
        cell.write_access = actor.access;
        cell.state = defined[at_offset - begin] ? State::kDefined : State::kUndefined;
    };
    for (size_t byte = 0; byte < defined.size(); byte += kWord) {
        const size_t num_bytes = std::min(kWord, defined.size() - byte);
        const auto* flags = defined.data() + byte;
        const bool is_mixed =
            std::any_of(flags, flags + num_bytes, [&](uint8_t flag) { return flag != flags[0]; });
        if (is_mixed) split(cell_at(begin + byte));
        for_each_cell(begin + byte, num_bytes, mark);
    }
}

void Memory::check_host_read(const Knowledge& know, size_t offset, size_t num_bytes) {
    const Actor host = {kHostRank, 0, &know, Access::kStrongSys, Proxy::kGeneric};
    for_each_cell(offset, num_bytes, [&](Cell& cell, size_t at_offset) {
        check_against_write(host, cell, at_offset, "read");
    });
}

void Memory::check_host_read_of_region(const Knowledge& know, size_t offset) {
    const Region* region = find_region(offset);
    check_host_read(know, region->begin, region->end - region->begin);
}

void Memory::check_bounds(const char* what, size_t offset, size_t num_bytes) const {
    if (is_foreign(offset)) return;
    const Region* region = offset == kOutside ? nullptr : find_region(offset);
    if (region && offset + num_bytes <= region->end) return;
    fail("out of bounds: %s of %zu bytes at %s", what, num_bytes, describe(offset).c_str());
}

void Memory::set_mbarrier(size_t offset, bool is_mbarrier) {
    for_each_cell(offset, 8, [&](Cell& cell, size_t) {
        const State state = is_mbarrier ? State::kMbarrier : State::kUndefined;
        cell = Cell{};
        cell.state = state;
    });
}

const Memory::Region* Memory::find_region(size_t offset) const {
    const auto after =
        std::upper_bound(regions_.begin(), regions_.end(), offset,
                         [](size_t value, const Region& region) { return value < region.begin; });
    return after == regions_.begin() ? nullptr : &*(after - 1);
}

std::string Memory::describe(size_t offset) const {
    if (is_foreign(offset)) return "memory of the host";
    const Region* region = offset == kOutside ? nullptr : find_region(offset);
    if (!region) return "memory outside the cluster";
    char text[96];
    std::snprintf(text, sizeof text, "+0x%zx", offset - region->begin);
    const std::string owner = region->rank < 0 ? "host" : "r" + std::to_string(region->rank);
    return owner + ":" + region->name + text + (offset < region->end ? "" : " (behind its end)");
}

int Memory::rank_of(size_t offset) const {
    const Region* region = is_foreign(offset) ? nullptr : find_region(offset);
    return region ? region->rank : kHostRank;
}

}  // namespace deepcomm::emu
