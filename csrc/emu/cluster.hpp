// SPDX-License-Identifier: Apache-2.0
// Public face of the emulator for tests: a small cluster of ranks, their memory, their kernels and
// the faults to inject. One Cluster is one seed; everything it does is a function of that seed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace deepcomm::emu {

constexpr int kHostRank = -1;  ///< owner of memory that the host shares with every rank
constexpr uint64_t kNever = ~uint64_t{0};

/// Faults, in virtual nanoseconds. A rank of -1 (and kNever) means none.
struct Faults {
    int stop_rank = -1;  ///< from stop_at_ns on, no thread of this rank runs
    uint64_t stop_at_ns = 0;
    int delay_rank = -1;  ///< no thread of this rank runs in [delay_from_ns, + delay_for_ns)
    uint64_t delay_from_ns = 0;
    uint64_t delay_for_ns = 0;
    int slow_src = -1;  ///< what slow_src sends to slow_dst becomes visible slow_extra_ns later
    int slow_dst = -1;
    uint64_t slow_extra_ns = 0;
};

struct Options {
    Faults faults;
    bool trace = false;          ///< print every event to stderr
    bool allow_foreign = false;  ///< kernels may use other memory of the process, unchecked
    int num_devices =
        0;  ///< ranks r and r + num_devices are streams of one device; 0: of their own
    uint64_t max_steps = 50'000'000;  ///< scheduler steps before the run is given up
    uint64_t max_idle_steps =
        400'000;  ///< steps in which nothing but loads happens: a raw spin loop
};

struct Launch {
    int grid = 1;
    int block = 32;
    size_t smem_bytes = 0;
    std::function<void()> kernel;  ///< called once by every thread
};

enum class Fill {
    kZero,    ///< defined zeros
    kPoison,  ///< 0xEE, and reading it before a write is an error
};

struct Statistics {
    uint64_t steps = 0;
    uint64_t switches = 0;
    uint64_t now_ns = 0;
    uint64_t trace_hash = 0;
    int num_threads = 0;
};

/// What the host thread of a rank waits for.
struct HostWait {
    enum class Kind {
        kNone,    ///< it does not wait
        kStream,  ///< all that its rank has launched is done
        kWord,    ///< *word == expected or *flag == flag_value, or the deadline has come
    };
    Kind kind = Kind::kNone;
    const uint64_t* word = nullptr;
    uint64_t expected = 0;
    const uint32_t* flag = nullptr;
    uint32_t flag_value = 0;
    uint64_t deadline_ns = kNever;
};

class Cluster {
  public:
    Cluster(int num_ranks, uint64_t seed, const Options& options = {});

    int num_ranks() const { return num_ranks_; }

    /// Memory of one rank that every rank can address, 128-byte aligned, with a guard behind it.
    void* alloc_bytes(int rank, const char* name, size_t num_bytes, Fill fill);
    template <typename T>
    T* alloc(int rank, const char* name, size_t count = 1, Fill fill = Fill::kPoison) {
        return static_cast<T*>(alloc_bytes(rank, name, count * sizeof(T), fill));
    }
    /// Ends the life of memory once the kernels launched so far have ended, as a driver's free
    /// waits for them: later accesses are errors.
    void free_bytes(void* begin);
    /// Marks memory that the host has filled as defined.
    void define(const void* begin, size_t num_bytes);

    /// Queues a kernel on the rank's stream: it starts when the one before has ended.
    void launch(int rank, Launch launch);
    /// Queues a meeting of all ranks' streams on the host.
    void host_barrier();

    /// Runs everything queued. Returns what went wrong, or nothing.
    std::string run();

    /// For hosts that go on while kernels run: runs until at least one wait is over and marks
    /// those that are. None is over where only the host of a stopped rank waits. May be called
    /// again, from any thread, with more launched in between. Returns what went wrong, or nothing.
    std::string run_until_any(const std::vector<HostWait>& waits, std::vector<char>* over);

    /// Tells that a rank's host has seen the word or flag of a wait without one: as after it, what
    /// it reads next must be ordered before.
    std::string observe(int rank, const HostWait& wait);
    /// Tells that a rank's host, or a later kernel of its stream, reads memory.
    std::string host_read(int rank, const void* begin, size_t num_bytes);

    /// What has run so far.
    Statistics statistics() const;

  private:
    int num_ranks_;
};

}  // namespace deepcomm::emu
