// SPDX-License-Identifier: Apache-2.0
// The interface of NCCL's network plugins of kinds "rma" and "gin", version 13, declared from its
// public description: what a library exports as ncclRmaPlugin_v13. The sizes asserted below are
// those of NCCL 2.30.7.
#pragma once

#include <cstddef>
#include <cstdint>

namespace loopback::nccl {

using Result = int;  // an enum of C
constexpr Result kSuccess = 0;
constexpr Result kSystemError = 2;
constexpr Result kInvalidArgument = 4;
constexpr Result kRemoteError = 6;

constexpr size_t kHandleBytes = 128;
constexpr int kHostMemory = 1;  // bits of pointer types
constexpr int kDeviceMemory = 2;
constexpr int kGinProxy = 2;  // a device type
constexpr int16_t kUndefined = -1;
constexpr size_t kMaxBytes = size_t{1} << 40;
constexpr uint32_t kIncrement = 1;  // operations of signals
constexpr uint32_t kAdd = 2;

using Logger = void (*)(int level, unsigned long flags, const char* file, int line,
                        const char* format, ...);

struct VirtualDevice {
    int num_devices;
    int devices[8];
};

struct Properties {
    char* name;
    char* pci_path;
    uint64_t guid;
    int pointer_types;
    int registration_is_global;
    int must_flush;
    int speed_mbps;
    int port;
    float latency_us;
    int max_comms;
    int max_receives;
    int device_type;
    int device_version;
    VirtualDevice virtual_device;
    size_t max_p2p_bytes;
    size_t max_collective_bytes;
    int max_multi_request;
    int16_t rail_id;
    int16_t plane_id;
};
static_assert(sizeof(Properties) == 128);

struct Config {
    int num_signals;
    int num_counters;
    int num_contexts;
    int queue_depth;
    int traffic_class;
};
static_assert(sizeof(Config) == 20);

struct DeviceHandle {
    int device_type;
    int device_version;
    void* handle;
    size_t num_bytes;
    int needs_progress;
};
static_assert(sizeof(DeviceHandle) == 32);

/// Offsets are bytes into registered memory; a request is complete once its source may be reused.
struct Plugin {
    const char* name;
    Result (*init)(void** instance, uint64_t comm_id, Logger logger);
    Result (*devices)(int* num_devices);
    Result (*get_properties)(int device, Properties* properties);
    Result (*listen)(void* instance, int device, void* handle, void** listener);
    Result (*connect)(void* instance, void* handles[], int num_ranks, int rank, void* listener,
                      void** comm);
    Result (*create_context)(void* comm, Config* config, void** context, DeviceHandle** handle);
    Result (*register_memory)(void* comm, void* address, size_t num_bytes, int type, uint64_t flags,
                              void** region, void** device_region);
    Result (*register_dma_buf)(void* comm, void* address, size_t num_bytes, int type,
                               uint64_t offset, int fd, uint64_t flags, void** region,
                               void** device_region);
    Result (*deregister)(void* comm, void* region);
    Result (*destroy_context)(void* context);
    Result (*close_comm)(void* comm);
    Result (*close_listener)(void* listener);
    Result (*put)(void* context, int context_idx, uint64_t src_offset, void* src, size_t num_bytes,
                  uint64_t dst_offset, void* dst, uint32_t peer, void** request);
    Result (*put_signal)(void* context, int context_idx, uint64_t src_offset, void* src,
                         size_t num_bytes, uint64_t dst_offset, void* dst, uint32_t peer,
                         uint64_t signal_offset, void* signal, uint64_t value, uint32_t operation,
                         void** request);
    Result (*get)(void* context, int context_idx, uint64_t remote_offset, void* remote,
                  size_t num_bytes, uint64_t local_offset, void* local, uint32_t peer,
                  void** request);
    Result (*flush)(void* context, int context_idx, void* region, uint32_t peer, void** request);
    Result (*test)(void* comm, void* request, int* done);
    Result (*progress)(void* context);
    Result (*query_last_error)(void* context, bool* has_error);
    Result (*finalize)(void* instance);
};
static_assert(sizeof(Plugin) == 168);

}  // namespace loopback::nccl
