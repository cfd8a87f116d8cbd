// SPDX-License-Identifier: Apache-2.0
// A network for NCCL's GIN proxy between the GPUs of one host, for tests: NCCL_RMA_PLUGIN names the
// library. NCCL's thread that serves the GPU's queue makes all calls for operations, other threads
// those that prepare and end something.
#include <sys/random.h>

#include <cstring>
#include <stdexcept>
#include <vector>

#include "comm.hpp"
#include "log.hpp"
#include "nccl_plugin.hpp"

namespace loopback {

namespace {

using nccl::Result;

char plugin_name[] = "deepcomm_loopback";

struct Handle {
    char path[nccl::kHandleBytes];
};

/// What NCCL holds for registered memory.
struct Registered {
    std::shared_ptr<const Region> region;
};

const std::shared_ptr<const Region>& region_of(void* handle) {
    return static_cast<Registered*>(handle)->region;
}

/// Runs a call; exceptions become a code, which NCCL reports, and a line on stderr.
template <typename Call>
Result guarded(const char* name, Call&& call) {
    try {
        return call();
    } catch (const std::exception& error) {
        log(kFailures, "%s: %s", name, error.what());
        return nccl::kSystemError;
    }
}

Result init(void** instance, uint64_t comm_id, nccl::Logger) {
    *instance = plugin_name;
    log(kCalls, "init for communicator %llx", static_cast<unsigned long long>(comm_id));
    return nccl::kSuccess;
}

Result finalize(void*) {
    log(kCalls, "finalize");
    return nccl::kSuccess;
}

Result devices(int* num_devices) {
    *num_devices = 1;
    return nccl::kSuccess;
}

Result get_properties(int device, nccl::Properties* properties) {
    *properties = {};
    properties->name = plugin_name;
    properties->guid = 1;
    properties->pointer_types = nccl::kHostMemory | nccl::kDeviceMemory;
    properties->speed_mbps = 100000;
    properties->port = 1;
    properties->max_comms = 1 << 16;
    properties->max_receives = 1;
    properties->device_type = nccl::kGinProxy;
    properties->virtual_device.num_devices = 1;
    properties->virtual_device.devices[0] = device;
    properties->max_p2p_bytes = nccl::kMaxBytes;
    properties->max_collective_bytes = nccl::kMaxBytes;
    properties->max_multi_request = 1;
    properties->rail_id = nccl::kUndefined;
    properties->plane_id = nccl::kUndefined;
    return nccl::kSuccess;
}

Result listen(void*, int device, void* handle, void** listener) {
    return guarded("listen", [&] {
        uint64_t word = 0;
        if (getrandom(&word, sizeof(word), 0) != sizeof(word)) {
            throw std::runtime_error("no random number");
        }
        const std::string folder = text_setting("DEEPCOMM_LOOPBACK_DIR", "/dev/shm");
        auto made = std::make_unique<Handle>();
        const int length =
            std::snprintf(made->path, sizeof(made->path), "%s/deepcomm-loopback-%016llx",
                          folder.c_str(), static_cast<unsigned long long>(word));
        if (length < 0 || static_cast<size_t>(length) >= sizeof(made->path)) {
            throw std::runtime_error("DEEPCOMM_LOOPBACK_DIR: expected a shorter path, got " +
                                     folder);
        }
        log(kCalls, "listen on device %d: %s", device, made->path);
        std::memcpy(handle, made.get(), sizeof(Handle));
        *listener = made.release();
        return nccl::kSuccess;
    });
}

Result close_listener(void* listener) {
    delete static_cast<Handle*>(listener);
    return nccl::kSuccess;
}

Result connect(void*, void* handles[], int num_ranks, int rank, void*, void** comm) {
    return guarded("connect", [&] {
        log(kCalls, "connect %d of %d", rank, num_ranks);
        std::vector<std::string> paths;
        for (int peer = 0; peer < num_ranks; ++peer) {
            paths.emplace_back(static_cast<const Handle*>(handles[peer])->path);
        }
        *comm = new Comm(paths, rank);
        return nccl::kSuccess;
    });
}

Result close_comm(void* comm) {
    log(kCalls, "close communicator %p", comm);
    delete static_cast<Comm*>(comm);
    return nccl::kSuccess;
}

/// A context is its communicator: all contexts between two ranks share a ring, in its order.
Result create_context(void* comm, nccl::Config* config, void** context,
                      nccl::DeviceHandle** handle) {
    static nccl::DeviceHandle unused{nccl::kGinProxy, 0, nullptr, 0, 1};
    log(kCalls, "create %d contexts of communicator %p", config->num_contexts, comm);
    *context = comm;
    *handle = &unused;
    return nccl::kSuccess;
}

Result destroy_context(void* context) {
    return guarded("destroy context", [&] {
        log(kCalls, "destroy contexts of communicator %p", context);
        static_cast<Comm*>(context)->settle();
        return nccl::kSuccess;
    });
}

Result register_memory(void* comm, void* address, size_t num_bytes, int type, uint64_t,
                       void** region, void** device_region) {
    return guarded("register", [&] {
        auto made = std::make_unique<Registered>();
        made->region =
            static_cast<Comm*>(comm)->add(address, num_bytes, type == nccl::kDeviceMemory);
        *region = *device_region = made.release();
        return nccl::kSuccess;
    });
}

Result register_dma_buf(void* comm, void* address, size_t num_bytes, int type, uint64_t, int,
                        uint64_t flags, void** region, void** device_region) {
    return register_memory(comm, address, num_bytes, type, flags, region, device_region);
}

Result deregister(void* comm, void* region) {
    return guarded("deregister", [&] {
        static_cast<Comm*>(comm)->remove(region_of(region)->index);
        delete static_cast<Registered*>(region);
        return nccl::kSuccess;
    });
}

struct Put {
    uint64_t src_offset;
    void* src;
    size_t num_bytes;
    uint64_t dst_offset;
    void* dst;
    uint32_t peer;
};

void log_operation(const char* name, const Put& put) {
    log(kOperations, "%s to %u: %zu bytes from memory %lld +%llu to %lld +%llu", name, put.peer,
        put.num_bytes,
        put.src == nullptr ? -1LL : static_cast<long long>(region_of(put.src)->index),
        static_cast<unsigned long long>(put.src_offset),
        put.dst == nullptr ? -1LL : static_cast<long long>(region_of(put.dst)->index),
        static_cast<unsigned long long>(put.dst_offset));
}

Comm& comm_for(void* context, uint32_t peer) {
    auto& comm = *static_cast<Comm*>(context);
    if (peer >= static_cast<uint32_t>(comm.num_ranks())) {
        throw std::runtime_error("peer: expected below " + std::to_string(comm.num_ranks()) +
                                 ", got " + std::to_string(peer));
    }
    return comm;
}

Work work_of(const Comm& comm, const Put& put) {
    Work work;
    work.entry.kind = Kind::kPut;
    work.entry.region = kNoRegion;
    if (put.num_bytes > 0) {
        work.source = region_of(put.src);
        comm.check(*work.source, put.src_offset, put.num_bytes);
        work.entry.region = region_of(put.dst)->index;
        work.entry.offset = put.dst_offset;
    }
    work.source_offset = put.src_offset;
    work.num_bytes = put.num_bytes;
    return work;
}

Result put(void* context, int, uint64_t src_offset, void* src, size_t num_bytes,
           uint64_t dst_offset, void* dst, uint32_t peer, void** request) {
    return guarded("put", [&] {
        const Put what{src_offset, src, num_bytes, dst_offset, dst, peer};
        Comm& comm = comm_for(context, peer);
        log_operation("put", what);
        *request = comm.start(work_of(comm, what), static_cast<int>(peer));
        return nccl::kSuccess;
    });
}

Result put_signal(void* context, int, uint64_t src_offset, void* src, size_t num_bytes,
                  uint64_t dst_offset, void* dst, uint32_t peer, uint64_t signal_offset,
                  void* signal, uint64_t value, uint32_t operation, void** request) {
    return guarded("put and signal", [&] {
        if (operation != nccl::kIncrement && operation != nccl::kAdd) {
            throw std::runtime_error("signal: expected increment or add, got operation " +
                                     std::to_string(operation));
        }
        const Put what{src_offset, src, num_bytes, dst_offset, dst, peer};
        Comm& comm = comm_for(context, peer);
        log_operation("put and signal", what);
        Work work = work_of(comm, what);
        work.entry.operation = operation;
        work.entry.other_region = region_of(signal)->index;
        work.entry.other_offset = signal_offset;
        work.entry.value = value;
        *request = comm.start(std::move(work), static_cast<int>(peer));
        return nccl::kSuccess;
    });
}

Result get(void* context, int, uint64_t remote_offset, void* remote, size_t num_bytes,
           uint64_t local_offset, void* local, uint32_t peer, void** request) {
    return guarded("get", [&] {
        Comm& comm = comm_for(context, peer);
        log_operation("get", {local_offset, local, num_bytes, remote_offset, remote, peer});
        comm.check(*region_of(local), local_offset, num_bytes);
        Work work;
        work.entry.kind = Kind::kGet;
        work.entry.region = region_of(remote)->index;
        work.entry.offset = remote_offset;
        work.entry.other_region = region_of(local)->index;
        work.entry.other_offset = local_offset;
        work.entry.value = num_bytes;
        *request = comm.start(std::move(work), static_cast<int>(peer));
        return nccl::kSuccess;
    });
}

/// A get is complete only once its data is visible: nothing is left to be done.
Result flush(void* context, int, void*, uint32_t peer, void** request) {
    return guarded("flush", [&] {
        *request = comm_for(context, peer).start_done(static_cast<int>(peer));
        return nccl::kSuccess;
    });
}

Result test(void* comm, void* request, int* done) {
    return guarded("test", [&] {
        const Comm::State state = static_cast<Comm*>(comm)->test(request);
        *done = state == Comm::State::kDone ? 1 : 0;
        return state == Comm::State::kFailed ? nccl::kRemoteError : nccl::kSuccess;
    });
}

Result progress(void* context) {
    return guarded("progress", [&] {
        static_cast<Comm*>(context)->progress();
        return nccl::kSuccess;
    });
}

Result query_last_error(void* context, bool* has_error) {
    *has_error = static_cast<Comm*>(context)->has_failed();
    return nccl::kSuccess;
}

constexpr nccl::Plugin make_plugin() {
    return {plugin_name,
            init,
            devices,
            get_properties,
            listen,
            connect,
            create_context,
            register_memory,
            register_dma_buf,
            deregister,
            destroy_context,
            close_comm,
            close_listener,
            put,
            put_signal,
            get,
            flush,
            test,
            progress,
            query_last_error,
            finalize};
}

}  // namespace

}  // namespace loopback

extern "C" {
__attribute__((visibility("default"))) loopback::nccl::Plugin ncclRmaPlugin_v13 =
    loopback::make_plugin();
__attribute__((visibility("default"))) loopback::nccl::Plugin ncclGinPlugin_v13 =
    loopback::make_plugin();
}
