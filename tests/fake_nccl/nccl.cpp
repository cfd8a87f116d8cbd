// SPDX-License-Identifier: Apache-2.0
// An NCCL without a GPU: moves bytes of host memory between the communicators of threads and
// processes, over sockets named by the unique id. Streams are ignored: a move is done when its group
// is. Any call can be made to fail, to hang in the library's thread, or to block its caller.
#include <poll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "host/nccl_api.hpp"

#ifndef FAKE_NCCL_HIDE
#define FAKE_NCCL_HIDE(name) name
#endif

namespace deepcomm::host::nccl {

constexpr Result kUnhandledCudaError = 1, kSystemError = 2, kInternalError = 3;
constexpr Result kInvalidArgument = 4, kInvalidUsage = 5;
constexpr int kPollMs = 2;

struct WindowObject {
    void* address;
    size_t num_bytes;
};

struct CommObject {
    std::vector<std::unique_ptr<WindowObject>> windows;
    bool has_dev_comm = false;
    int rank = 0, num_ranks = 0;
    std::string id;
    int listener = -1;
    std::vector<int> to, from;  ///< sockets, by peer
    std::atomic<Result> state{kSuccess};
    bool is_finalized = false;
    std::shared_ptr<std::atomic<bool>> is_aborted = std::make_shared<std::atomic<bool>>(false);
    std::thread job;
};

}  // namespace deepcomm::host::nccl

namespace {

using namespace deepcomm::host::nccl;
using Stream = deepcomm::host::cu::Stream;

std::mutex mutex;
std::map<std::string, int> wishes;
std::string last_error;
Config last_config{};
uintptr_t last_stream = 0;
int num_live = 0;

int wish(const std::string& name, int otherwise = 0) {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto entry = wishes.find(name);
    return entry == wishes.end() ? otherwise : entry->second;
}

Result fail(Result code, const char* why) {
    const std::lock_guard<std::mutex> lock(mutex);
    last_error = why;
    return code;
}

#define BEGIN(name)                                                 \
    if (const Result code = wish("fail " name); code != kSuccess) { \
        return fail(code, "as the test wants it");                  \
    }

void nap() { std::this_thread::sleep_for(std::chrono::milliseconds(kPollMs)); }

void finish(Comm comm) {
    if (comm->job.joinable()) comm->job.join();
}

/// Runs something in the library's thread; the communicator is in progress meanwhile.
Result start(Comm comm, const std::string& name, std::function<Result(Comm)> run) {
    finish(comm);
    comm->state = kInProgress;
    const bool hangs = wish("hang " + name) != 0;
    comm->job = std::thread([comm, run = std::move(run), hangs] {
        while (hangs && !*comm->is_aborted) nap();
        comm->state = *comm->is_aborted ? kInternalError : run(comm);
    });
    return kInProgress;
}

/// Where a rank is met: a name of this network namespace, not of a file system.
sockaddr_un address_of(const std::string& id, int rank, socklen_t& size) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::string name = "fake-nccl-";
    for (int index = 0; index < 16; ++index) {
        char digits[3];
        std::snprintf(digits, sizeof(digits), "%02x", static_cast<unsigned char>(id[index]));
        name += digits;
    }
    name += "-" + std::to_string(rank);
    std::memcpy(address.sun_path + 1, name.data(), name.size());
    size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
    return address;
}

int make_socket() { return socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0); }

bool connect_to(Comm comm, int peer) {
    socklen_t size = 0;
    const sockaddr_un address = address_of(comm->id, peer, size);
    comm->to[peer] = make_socket();
    while (connect(comm->to[peer], reinterpret_cast<const sockaddr*>(&address), size) != 0) {
        if (*comm->is_aborted) return false;
        nap();
    }
    return send(comm->to[peer], &comm->rank, sizeof(int), MSG_NOSIGNAL) == sizeof(int);
}

bool accept_one(Comm comm) {
    pollfd ready{comm->listener, POLLIN, 0};
    while (poll(&ready, 1, kPollMs) == 0) {
        if (*comm->is_aborted) return false;
    }
    const int fd = accept4(comm->listener, nullptr, nullptr, SOCK_CLOEXEC);
    int peer = -1;
    if (recv(fd, &peer, sizeof(peer), MSG_WAITALL) != sizeof(peer)) return false;
    comm->from[peer] = fd;
    return true;
}

Result meet(Comm comm) {
    for (int peer = 0; peer < comm->num_ranks; ++peer) {
        if (!connect_to(comm, peer)) return kSystemError;
    }
    for (int peer = 0; peer < comm->num_ranks; ++peer) {
        if (!accept_one(comm)) return fail(kRemoteError, "a peer left while it was met");
    }
    return kSuccess;
}

/// Bytes one way between two ranks. Their number goes first, so that other ends are noticed.
struct Transfer {
    uint64_t size;
    char* data;
    uint64_t num_done = 0;  ///< of the eight bytes of the size, then of the data
    uint64_t peers_size = 0;
};

struct Way {
    int fd;
    bool is_send;
    std::deque<Transfer> queue;
};

/// Moves some bytes of the first transfer. Returns kInProgress while all is well.
Result advance(Way& way) {
    Transfer& transfer = way.queue.front();
    const bool is_size = transfer.num_done < sizeof(uint64_t);
    char* const size = reinterpret_cast<char*>(way.is_send ? &transfer.size : &transfer.peers_size);
    char* const at =
        is_size ? size + transfer.num_done : transfer.data + (transfer.num_done - sizeof(uint64_t));
    const uint64_t left = (is_size ? 0 : transfer.size) + sizeof(uint64_t) - transfer.num_done;
    const ssize_t moved = way.is_send ? send(way.fd, at, left, MSG_DONTWAIT | MSG_NOSIGNAL)
                                      : recv(way.fd, at, left, MSG_DONTWAIT);
    if (moved < 0 && errno == EAGAIN) return kInProgress;
    if (moved <= 0) return fail(kRemoteError, "a peer closed its socket");
    transfer.num_done += static_cast<uint64_t>(moved);
    if (is_size && !way.is_send && transfer.num_done == sizeof(uint64_t) &&
        transfer.peers_size != transfer.size) {
        return fail(kInvalidUsage, "a send and its receive differ in size");
    }
    if (transfer.num_done == transfer.size + sizeof(uint64_t)) way.queue.pop_front();
    return kInProgress;
}

Result run_ways(Comm comm, std::vector<Way>& ways) {
    while (!*comm->is_aborted) {
        std::vector<pollfd> waiting;
        std::vector<Way*> of;
        for (Way& way : ways) {
            if (way.queue.empty()) continue;
            waiting.push_back({way.fd, static_cast<short>(way.is_send ? POLLOUT : POLLIN), 0});
            of.push_back(&way);
        }
        if (waiting.empty()) return kSuccess;
        poll(waiting.data(), waiting.size(), kPollMs);
        for (size_t index = 0; index < waiting.size(); ++index) {
            if (waiting[index].revents == 0) continue;
            const Result code = advance(*of[index]);
            if (code != kInProgress) return code;
        }
    }
    return kInternalError;
}

struct Operation {
    Comm comm;
    int peer;
    bool is_send;
    Transfer transfer;
};

thread_local int depth = 0;
thread_local std::vector<Operation> group;

Result add(const Operation& operation, int type, Stream stream) {
    const Comm comm = operation.comm;
    if (depth == 0 || type != kUint8 || operation.transfer.size == 0 || operation.peer < 0 ||
        operation.peer >= comm->num_ranks) {
        return fail(kInvalidArgument, "not what this library is for");
    }
    last_stream = reinterpret_cast<uintptr_t>(stream);
    group.push_back(operation);
    return comm->state;
}

Result launch(std::vector<Operation> operations) {
    const Comm comm = operations.front().comm;
    return start(comm, "ncclGroupEnd", [operations = std::move(operations)](Comm comm) {
        std::vector<Way> ways;
        for (int peer = 0; peer < comm->num_ranks; ++peer) {
            ways.push_back({comm->to[peer], true, {}});
            ways.push_back({comm->from[peer], false, {}});
        }
        for (const Operation& operation : operations) {
            ways[2 * operation.peer + (operation.is_send ? 0 : 1)].queue.push_back(
                operation.transfer);
        }
        return run_ways(comm, ways);
    });
}

void free_comm(Comm comm) {
    finish(comm);
    for (const std::vector<int>* const fds : {&comm->to, &comm->from}) {
        for (const int fd : *fds) {
            if (fd >= 0) close(fd);
        }
    }
    if (comm->listener >= 0) close(comm->listener);
    delete comm;
    const std::lock_guard<std::mutex> lock(mutex);
    --num_live;
}

bool is_understood(const Config& config) {
    return config.magic == 0xcafebeef && config.size >= sizeof(Config) && config.blocking == 0;
}

}  // namespace

#include "device_api.hpp"

extern "C" {

Result ncclGetVersion(int* version) {
    *version = wish("version", 22809);
    return kSuccess;
}
const char* ncclGetErrorString(Result error) {
    return error == kRemoteError ? "remote process exited or there was a network error"
                                 : "as NCCL calls it";
}
const char* ncclGetLastError(Comm) {
    const std::lock_guard<std::mutex> lock(mutex);
    thread_local std::string copy;
    copy = last_error;
    return copy.c_str();
}
Result ncclGetUniqueId(UniqueId* id) {
    BEGIN("ncclGetUniqueId")
    return getrandom(id->bytes, sizeof(id->bytes), 0) == sizeof(id->bytes) ? kSuccess
                                                                           : kSystemError;
}

Result ncclCommInitRankConfig(Comm* result, int num_ranks, UniqueId id, int rank, Config* config) {
    BEGIN("ncclCommInitRankConfig")
    if (!is_understood(*config)) return fail(kInvalidArgument, "not the configuration expected");
    auto* const comm = new CommObject;
    comm->rank = rank;
    comm->num_ranks = num_ranks;
    comm->id.assign(id.bytes, sizeof(id.bytes));
    comm->to.assign(static_cast<size_t>(num_ranks), -1);
    comm->from = comm->to;
    comm->listener = make_socket();
    {
        const std::lock_guard<std::mutex> lock(mutex);
        last_config = *config;
        ++num_live;
    }
    socklen_t size = 0;
    const sockaddr_un address = address_of(comm->id, rank, size);
    if (bind(comm->listener, reinterpret_cast<const sockaddr*>(&address), size) != 0 ||
        listen(comm->listener, num_ranks) != 0) {
        free_comm(comm);
        return fail(kInvalidUsage, "two ranks with the same number");
    }
    *result = comm;
    return start(comm, "ncclCommInitRankConfig", meet);
}
Result ncclCommGetAsyncError(Comm comm, Result* error) {
    *error = comm->state == kSuccess ? wish("async error") : comm->state.load();
    if (*error != kInProgress) finish(comm);
    return kSuccess;
}
Result FAKE_NCCL_HIDE(ncclCommFinalize)(Comm comm) {
    BEGIN("ncclCommFinalize")
    comm->is_finalized = true;
    return start(comm, "ncclCommFinalize", [](Comm) { return kSuccess; });
}
Result ncclCommDestroy(Comm comm) {
    if (!comm->is_finalized || comm->state != kSuccess) {
        return fail(kInvalidUsage, "destroyed before it was finalized");
    }
    if (!comm->windows.empty() || comm->has_dev_comm) {
        return fail(kInvalidUsage, "destroyed with windows or a device communicator");
    }
    free_comm(comm);
    return kSuccess;
}
Result ncclCommAbort(Comm comm) {
    *comm->is_aborted = true;
    free_comm(comm);
    return wish("fail ncclCommAbort");
}

Result ncclGroupStart() {
    BEGIN("ncclGroupStart")
    ++depth;
    return kSuccess;
}
Result ncclGroupEnd() {
    if (--depth > 0) return kSuccess;
    std::vector<Operation> operations;
    operations.swap(group);
    if (operations.empty()) return kSuccess;
    const auto is_aborted = operations.front().comm->is_aborted;
    if (wish("block ncclGroupEnd") != 0) {
        while (!*is_aborted) nap();
        return fail(kInternalError, "aborted below the caller");
    }
    BEGIN("ncclGroupEnd")
    return launch(std::move(operations));
}
Result ncclSend(const void* from, size_t count, int type, int peer, Comm comm, Stream stream) {
    BEGIN("ncclSend")
    return add({comm, peer, true, {count, static_cast<char*>(const_cast<void*>(from))}}, type,
               stream);
}
Result ncclRecv(void* to, size_t count, int type, int peer, Comm comm, Stream stream) {
    BEGIN("ncclRecv")
    return add({comm, peer, false, {count, static_cast<char*>(to)}}, type, stream);
}

/// "version": what ncclGetVersion says; "async error": a code; "fail CALL": a code; "hang CALL":
/// what the call has started does not end; "block CALL": the call itself does not. "no windows", "no
/// device api", "gin type", "railed gin type", "lsa teams": what there is of the device API.
void fake_nccl_wish(const char* name, int value) {
    const std::lock_guard<std::mutex> lock(mutex);
    wishes[name] = value;
}
void fake_nccl_reset() {
    const std::lock_guard<std::mutex> lock(mutex);
    wishes.clear();
    last_error.clear();
}
int fake_nccl_num_live() {
    const std::lock_guard<std::mutex> lock(mutex);
    return num_live;
}
/// Whether this thread has a group that was not ended.
int fake_nccl_depth() { return depth; }
/// Size and version of the configuration, blocking, traffic class, maximum of CTAs; the stream.
void fake_nccl_last(int64_t* values) {
    const std::array<int64_t, 6> last{static_cast<int64_t>(last_config.size),
                                      last_config.version,
                                      last_config.blocking,
                                      last_config.traffic_class,
                                      last_config.max_ctas,
                                      static_cast<int64_t>(last_stream)};
    std::memcpy(values, last.data(), sizeof(last));
}
}
