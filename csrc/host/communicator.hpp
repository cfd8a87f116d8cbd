// SPDX-License-Identifier: Apache-2.0
// One rank's NCCL communicator. It does not block: whatever takes long goes on in a thread of NCCL,
// and is awaited here, with a deadline. A failure ends the communicator: NCCL says nothing of what
// could still be done with it.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "host/device.hpp"
#include "host/nccl.hpp"

namespace deepcomm::host {

struct CommunicatorConfig {
    std::string name;  ///< what messages call this rank
    int rank;
    int num_ranks;
    std::string unique_id;  ///< the same on all ranks
    int traffic_class = nccl::kUndefined;
    int max_ctas = nccl::kUndefined;
};

/// How long to wait, and what to call now and then meanwhile; it may throw.
struct Patience {
    double timeout_s;
    std::function<void()> check_interrupt;
};

/// Device memory that goes to a peer, or that is filled by it.
struct Transfer {
    int peer;
    uintptr_t address;
    int64_t num_bytes;
};

struct Transfers {
    std::vector<Transfer> sends;
    std::vector<Transfer> receives;
};

class Communicator {
  public:
    /// Meets the other ranks. Throws CommTimeout if they do not come in time.
    Communicator(std::shared_ptr<Device> device, std::shared_ptr<Nccl> nccl,
                 const CommunicatorConfig& config, const Patience& patience);
    /// Aborts, unless it is closed.
    ~Communicator();
    Communicator(const Communicator&) = delete;
    Communicator& operator=(const Communicator&) = delete;

    /// Launches all transfers on a stream, as one group. Between two ranks the n-th send meets the
    /// n-th receive; those without bytes are left out on both sides. Throws CommTimeout if NCCL does
    /// not get so far in time, and what has gone wrong in earlier moves.
    void move(cu::Stream stream, const Transfers& transfers, const Patience& patience);
    /// Calls a function of the library for the communicator, and waits until it has done its work, by
    /// a deadline. It may write to where its arguments point until then, or later if this throws.
    void call(const char* name, const Patience& patience,
              const std::function<nccl::Result(nccl::Comm)>& function);
    /// Ends moves under way, on the device too. From any thread; idempotent.
    void abort() noexcept;
    /// Waits for this rank's moves and leaves; aborts if that fails or takes too long. Idempotent.
    /// Returns what went wrong, or nothing.
    std::string close(const Patience& patience);

    const Nccl& nccl() const { return *nccl_; }

  private:
    class Deadline;

    void meet(nccl::Config& wishes, const CommunicatorConfig& config, const Patience& patience);
    void check_transfers(const std::vector<Transfer>& transfers) const;
    void run_group(nccl::Comm comm, cu::Stream stream, const Transfers& transfers) const;
    void await(nccl::Comm comm, const char* call, Deadline& deadline) const;
    nccl::Comm usable() const;
    void check(nccl::Result code, const char* call) const;
    /// Says, for all later calls, why they cannot be; the first reason stays.
    void give_reason(const std::string& reason) const;
    std::string reason() const;
    void end() noexcept;

    std::shared_ptr<Device> device_;
    std::shared_ptr<Nccl> nccl_;
    const std::string name_;
    const int num_ranks_;
    /// Who calls NCCL. An abort takes it only if that can be had soon.
    std::timed_mutex calls_;
    std::atomic<bool> is_aborted_{false};
    std::atomic<nccl::Comm> comm_{nullptr};
    mutable std::mutex reason_mutex_;
    mutable std::string reason_;
};

}  // namespace deepcomm::host
