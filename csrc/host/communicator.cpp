// SPDX-License-Identifier: Apache-2.0
#include "host/communicator.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>

namespace deepcomm::host {

namespace {

using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;

// A group takes tens of microseconds of NCCL's thread, the first one with a peer and the meeting of
// all ranks take longer.
constexpr auto kYield = std::chrono::microseconds(200);
constexpr auto kNap = std::chrono::microseconds(50);
constexpr auto kLongNap = std::chrono::milliseconds(2);
constexpr auto kSlice = std::chrono::milliseconds(50);

/// Whoever waits in this file sees an abort sooner. A call of NCCL that takes longer is stuck: NCCL
/// lets another thread abort the communicator below it.
constexpr auto kGrace = std::chrono::seconds(1);

void pause(Clock::duration waited) {
    if (waited < kYield) {
        std::this_thread::yield();
    } else {
        std::this_thread::sleep_for(
            std::clamp<Clock::duration>(waited / 16, Clock::duration(kNap), kLongNap));
    }
}

nccl::Config wishes_of(const CommunicatorConfig& config, int version) {
    DEEPCOMM_CHECK_ARG(config.rank >= 0 && config.rank < config.num_ranks,
                       "rank: expected one of %d, got %d", config.num_ranks, config.rank);
    DEEPCOMM_CHECK_ARG(config.unique_id.size() == sizeof(nccl::UniqueId),
                       "unique_id: expected %zu bytes, got %zu", sizeof(nccl::UniqueId),
                       config.unique_id.size());
    if (config.traffic_class != nccl::kUndefined && version < nccl::kTrafficClassVersion) {
        throw NcclError(format("traffic_class: expected NCCL %s or newer, got %s",
                               nccl_version_text(nccl::kTrafficClassVersion).c_str(),
                               nccl_version_text(version).c_str()));
    }
    nccl::Config wishes{};
    wishes.blocking = 0;
    wishes.max_ctas = config.max_ctas;
    wishes.traffic_class = config.traffic_class;
    return wishes;
}

bool is_failure(nccl::Result code) { return code != nccl::kSuccess && code != nccl::kInProgress; }

}  // namespace

class Communicator::Deadline {
  public:
    explicit Deadline(const Patience& patience) : patience_(patience) {}

    double timeout_s() const { return patience_.timeout_s; }
    /// Lets some time pass. Returns whether there is any left.
    bool wait() {
        const auto now = Clock::now();
        if (now > next_check_) {
            patience_.check_interrupt();
            next_check_ = now + kSlice;
        }
        pause(now - start_);
        return now - start_ < Seconds(patience_.timeout_s);
    }

  private:
    const Patience& patience_;
    const Clock::time_point start_ = Clock::now();
    Clock::time_point next_check_ = start_ + kSlice;
};

Communicator::Communicator(std::shared_ptr<Device> device, std::shared_ptr<Nccl> nccl,
                           const CommunicatorConfig& config, const Patience& patience)
    : device_(std::move(device)),
      nccl_(std::move(nccl)),
      name_(config.name),
      num_ranks_(config.num_ranks) {
    nccl::Config wishes = wishes_of(config, nccl_->version());
    try {
        meet(wishes, config, patience);
    } catch (...) {
        end();
        throw;
    }
}

Communicator::~Communicator() { end(); }

void Communicator::meet(nccl::Config& wishes, const CommunicatorConfig& config,
                        const Patience& patience) {
    constexpr char kCall[] = "ncclCommInitRankConfig()";
    nccl::UniqueId id{};
    std::memcpy(id.bytes, config.unique_id.data(), sizeof(id.bytes));
    Deadline deadline(patience);
    const Device::Current current(*device_);
    nccl::Comm comm = nullptr;
    const nccl::Result code =
        nccl_->api().ncclCommInitRankConfig(&comm, config.num_ranks, id, config.rank, &wishes);
    comm_ = comm;
    check(code, kCall);
    await(comm, kCall, deadline);
}

void Communicator::move(cu::Stream stream, const Transfers& transfers, const Patience& patience) {
    check_transfers(transfers.sends);
    check_transfers(transfers.receives);
    const std::lock_guard<std::timed_mutex> lock(calls_);
    const nccl::Comm comm = usable();
    const Device::Current current(*device_);
    Deadline deadline(patience);
    try {
        await(comm, "an earlier move", deadline);
        run_group(comm, stream, transfers);
        await(comm, "a move", deadline);
    } catch (const Error& error) {
        give_reason(format("failed: %s", error.what()));
        end();
        throw;
    } catch (...) {
        give_reason("was interrupted");
        end();
        throw;
    }
}

void Communicator::call(const char* name, const Patience& patience,
                        const std::function<nccl::Result(nccl::Comm)>& function) {
    const std::lock_guard<std::timed_mutex> lock(calls_);
    const nccl::Comm comm = usable();
    const Device::Current current(*device_);
    Deadline deadline(patience);
    check(function(comm), name);
    await(comm, name, deadline);
}

void Communicator::check_transfers(const std::vector<Transfer>& transfers) const {
    for (const Transfer& transfer : transfers) {
        DEEPCOMM_CHECK_ARG(transfer.peer >= 0 && transfer.peer < num_ranks_,
                           "peer: expected one of %d ranks, got %d", num_ranks_, transfer.peer);
        DEEPCOMM_CHECK_ARG(transfer.num_bytes >= 0, "num_bytes: expected at least 0, got %lld",
                           static_cast<long long>(transfer.num_bytes));
    }
}

void Communicator::run_group(nccl::Comm comm, cu::Stream stream, const Transfers& transfers) const {
    const nccl::Api& api = nccl_->api();
    const char* call = "ncclGroupStart()";
    nccl::Result code = api.ncclGroupStart();
    check(code, call);
    const auto launch = [&](const char* name, const auto& transfers_of_kind, const auto& function) {
        for (const Transfer& transfer : transfers_of_kind) {
            if (is_failure(code)) return;
            if (transfer.num_bytes == 0) continue;
            call = name;
            code = function(reinterpret_cast<void*>(transfer.address),
                            static_cast<size_t>(transfer.num_bytes), nccl::kUint8, transfer.peer,
                            comm, stream);
        }
    };
    launch("ncclSend()", transfers.sends, api.ncclSend);
    launch("ncclRecv()", transfers.receives, api.ncclRecv);
    // NOTE: also after a failure, or all later calls of this thread would belong to the group.
    const nccl::Result end = api.ncclGroupEnd();
    usable();  // an abort explains what else went wrong
    check(code, call);
    check(end, "ncclGroupEnd()");
}

void Communicator::await(nccl::Comm comm, const char* call, Deadline& deadline) const {
    while (true) {
        usable();  // an abort will soon free comm, or has
        nccl::Result state = nccl::kSuccess;
        check(nccl_->api().ncclCommGetAsyncError(comm, &state), "ncclCommGetAsyncError()");
        if (state != nccl::kInProgress) {
            check(state, call);
            return;
        }
        if (!deadline.wait()) {
            throw CommTimeout(format("%s: NCCL: %s of %d ranks did not end within %g s",
                                     name_.c_str(), call, num_ranks_, deadline.timeout_s()),
                              -1);
        }
    }
}

nccl::Comm Communicator::usable() const {
    const nccl::Comm comm = comm_;
    if (is_aborted_ || comm == nullptr) {
        throw PeerLost(format("%s: NCCL: expected a communicator in use, got one that %s",
                              name_.c_str(), reason().c_str()),
                       -1);
    }
    return comm;
}

void Communicator::check(nccl::Result code, const char* call) const {
    nccl_->check(code, name_ + ": NCCL: " + call);
}

void Communicator::abort() noexcept {
    give_reason("was aborted");
    is_aborted_ = true;
    if (calls_.try_lock_for(kGrace)) {
        const std::lock_guard<std::timed_mutex> lock(calls_, std::adopt_lock);
        end();
    } else {
        end();
    }
}

std::string Communicator::close(const Patience& patience) {
    if (!calls_.try_lock_for(Seconds(patience.timeout_s))) {
        abort();
        return format("%s: NCCL: a move did not end within %g s", name_.c_str(),
                      patience.timeout_s);
    }
    const std::lock_guard<std::timed_mutex> lock(calls_, std::adopt_lock);
    const nccl::Comm comm = comm_;
    if (comm == nullptr) return "";
    const Device::Current current(*device_);
    Deadline deadline(patience);
    try {
        check(nccl_->api().ncclCommFinalize(comm), "ncclCommFinalize()");
        await(comm, "ncclCommFinalize()", deadline);
        give_reason("was closed");
        if (comm_.exchange(nullptr) != nullptr) {
            check(nccl_->api().ncclCommDestroy(comm), "ncclCommDestroy()");
        }
        return "";
    } catch (const Error& error) {
        give_reason("was closed");
        end();
        return error.what();
    } catch (...) {
        give_reason("was closed");
        end();
        throw;
    }
}

void Communicator::give_reason(const std::string& reason) const {
    const std::lock_guard<std::mutex> lock(reason_mutex_);
    if (reason_.empty()) reason_ = reason;
}

std::string Communicator::reason() const {
    const std::lock_guard<std::mutex> lock(reason_mutex_);
    return reason_;
}

void Communicator::end() noexcept {
    const nccl::Comm comm = comm_.exchange(nullptr);  // one thread ends it
    if (comm == nullptr) return;
    const Device::Current current(*device_, std::nothrow);
    DEEPCOMM_NCCL_LOG(*nccl_, ncclCommAbort(comm));
}

}  // namespace deepcomm::host
