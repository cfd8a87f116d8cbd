// SPDX-License-Identifier: Apache-2.0
// The part of CUDA's driver API that the host layer calls: types, constants and the table of
// functions, declared from its public documentation. The extension is built without CUDA's headers;
// where they are installed, a test compares the two.
#pragma once

#include <cstddef>
#include <cstdint>

namespace deepcomm::host::cu {

using Result = int;  // an enum of C
using Device = int;
using DevicePtr = unsigned long long;
using AllocationHandle = unsigned long long;
using Context = struct ContextObject*;
using Module = struct ModuleObject*;
using Function = struct FunctionObject*;
using Stream = struct StreamObject*;

constexpr Result kSuccess = 0;
constexpr Result kOutOfMemory = 2;
constexpr Result kDeinitialized = 4;  ///< the process is ending

/// Version whose signatures the table below has, and the flag that picks the usual default stream.
constexpr int kApiVersion = 12000;
constexpr int kNewestApiVersion = 12040;  ///< of the functions that may be absent
constexpr uint64_t kLegacyStream = 1;

enum DeviceAttribute : int {
    kNumSms = 16,
    kSmSharedBytes = 81,
    kReservedSharedBytes = 111,
    kCapabilityMajor = 75,
    kCapabilityMinor = 76,
    kVirtualMemorySupported = 102,
    kPosixFdSupported = 103,
    kRdmaWithVirtualMemorySupported = 110,
    kFabricSupported = 128,
};

enum FunctionAttribute : int {
    kMaxThreadsPerBlock = 0,
    kStaticSharedBytes = 1,
    kMaxDynamicSharedBytes = 8
};

constexpr int kPinned = 1;     ///< CUmemAllocationType
constexpr int kOnDevice = 1;   ///< CUmemLocationType
constexpr int kReadWrite = 3;  ///< CUmemAccess_flags
constexpr int kMinimumGranularity = 0;
constexpr int kPosixFd = 1;  ///< CUmemAllocationHandleType, flags
constexpr int kFabric = 8;
constexpr unsigned kHostPortable = 1;
constexpr unsigned kHostDeviceMap = 2;
constexpr unsigned kNonBlocking = 1;  ///< stream that does not wait for the default stream

struct Location {
    int type;
    int id;
};

struct AllocationFlags {
    unsigned char compression_type;
    unsigned char gpu_direct_rdma_capable;
    unsigned short usage;
    unsigned char reserved[4];
};

struct AllocationProperties {
    int type;
    int handle_types;
    Location location;
    void* windows_metadata;
    AllocationFlags flags;
};

struct AccessDescription {
    Location location;
    int flags;
};

/// A launch may begin before the kernel ahead of it has ended.
constexpr int kProgrammaticStreamSerialization = 6;
/// The first driver that captures such launches as edges of a graph.
constexpr int kDriverOfGraphEdges = 12030;

/// The driver's union of values is 64 bytes, here an int.
struct LaunchAttribute {
    int id;
    int padding;
    int value;
    int unused[15];
};
static_assert(sizeof(LaunchAttribute) == 72, "as the driver has it");

struct LaunchConfig {
    unsigned grid[3];
    unsigned block[3];
    unsigned shared_bytes;
    Stream stream;
    LaunchAttribute* attributes;
    unsigned num_attributes;
};

struct Uuid {
    unsigned char bytes[16];
};

struct FabricHandle {
    unsigned char bytes[64];
};

// X(name, parameters): what every driver since CUDA 12.0 has.
#define DEEPCOMM_CUDA_FUNCTIONS(X)                                                                \
    X(cuInit, (unsigned flags))                                                                   \
    X(cuDriverGetVersion, (int* version))                                                         \
    X(cuGetErrorName, (Result error, const char** text))                                          \
    X(cuGetErrorString, (Result error, const char** text))                                        \
    X(cuDeviceGetCount, (int* count))                                                             \
    X(cuDeviceGet, (Device * device, int ordinal))                                                \
    X(cuDeviceGetName, (char* name, int size, Device device))                                     \
    X(cuDeviceGetUuid, (Uuid * uuid, Device device))                                              \
    X(cuDeviceGetAttribute, (int* value, int attribute, Device device))                           \
    X(cuDeviceCanAccessPeer, (int* can_access, Device device, Device peer))                       \
    X(cuDevicePrimaryCtxRetain, (Context * context, Device device))                               \
    X(cuDevicePrimaryCtxRelease, (Device device))                                                 \
    X(cuDevicePrimaryCtxGetState, (Device device, unsigned* flags, int* active))                  \
    X(cuCtxGetCurrent, (Context * context))                                                       \
    X(cuCtxPushCurrent, (Context context))                                                        \
    X(cuCtxPopCurrent, (Context * context))                                                       \
    X(cuMemGetInfo, (size_t* free, size_t* total))                                                \
    X(cuMemAllocAsync, (DevicePtr * address, size_t num_bytes, Stream stream))                    \
    X(cuMemFreeAsync, (DevicePtr address, Stream stream))                                         \
    X(cuMemHostAlloc, (void** address, size_t num_bytes, unsigned flags))                         \
    X(cuMemHostGetDevicePointer, (DevicePtr * address, void* host_address, unsigned flags))       \
    X(cuMemFreeHost, (void* address))                                                             \
    X(cuMemsetD8Async, (DevicePtr address, unsigned char value, size_t num_bytes, Stream stream)) \
    X(cuMemcpyHtoDAsync, (DevicePtr to, const void* from, size_t num_bytes, Stream stream))       \
    X(cuMemGetAllocationGranularity,                                                              \
      (size_t* granularity, const AllocationProperties* properties, int option))                  \
    X(cuMemCreate, (AllocationHandle * handle, size_t num_bytes,                                  \
                    const AllocationProperties* properties, unsigned long long flags))            \
    X(cuMemRelease, (AllocationHandle handle))                                                    \
    X(cuMemExportToShareableHandle,                                                               \
      (void* shareable, AllocationHandle handle, int type, unsigned long long flags))             \
    X(cuMemImportFromShareableHandle, (AllocationHandle * handle, void* shareable, int type))     \
    X(cuMemAddressReserve, (DevicePtr * address, size_t num_bytes, size_t alignment,              \
                            DevicePtr wish, unsigned long long flags))                            \
    X(cuMemAddressFree, (DevicePtr address, size_t num_bytes))                                    \
    X(cuMemMap, (DevicePtr address, size_t num_bytes, size_t offset, AllocationHandle handle,     \
                 unsigned long long flags))                                                       \
    X(cuMemUnmap, (DevicePtr address, size_t num_bytes))                                          \
    X(cuMemSetAccess,                                                                             \
      (DevicePtr address, size_t num_bytes, const AccessDescription* descriptions, size_t count)) \
    X(cuStreamCreateWithPriority, (Stream * stream, unsigned flags, int priority))                \
    X(cuCtxSynchronize, ())                                                                       \
    X(cuStreamSynchronize, (Stream stream))                                                       \
    X(cuStreamDestroy, (Stream stream))                                                           \
    X(cuModuleLoadDataEx,                                                                         \
      (Module * module, const void* image, unsigned count, int* options, void** values))          \
    X(cuModuleUnload, (Module module))                                                            \
    X(cuModuleGetFunction, (Function * function, Module module, const char* name))                \
    X(cuFuncGetAttribute, (int* value, int attribute, Function function))                         \
    X(cuFuncSetAttribute, (Function function, int attribute, int value))                          \
    X(cuOccupancyMaxActiveBlocksPerMultiprocessor,                                                \
      (int* num_blocks, Function function, int block_size, size_t shared_bytes))                  \
    X(cuLaunchKernelEx,                                                                           \
      (const LaunchConfig* config, Function function, void** params, void** extra))

// What newer drivers have; null where this one has not.
#define DEEPCOMM_CUDA_OPTIONAL_FUNCTIONS(X) \
    X(cuFuncLoad, (Function function))      \
    X(cuFuncGetParamInfo, (Function function, size_t index, size_t* offset, size_t* num_bytes))

struct Api {
#define DEEPCOMM_CUDA_MEMBER(name, parameters) Result(*name) parameters = nullptr;
    DEEPCOMM_CUDA_FUNCTIONS(DEEPCOMM_CUDA_MEMBER)
    DEEPCOMM_CUDA_OPTIONAL_FUNCTIONS(DEEPCOMM_CUDA_MEMBER)
#undef DEEPCOMM_CUDA_MEMBER
};

}  // namespace deepcomm::host::cu
