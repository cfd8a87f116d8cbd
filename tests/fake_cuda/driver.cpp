// SPDX-License-Identifier: Apache-2.0
// A driver library without a GPU: memory is the host's, so that processes really share it, kernels
// do nothing, every call is counted, and any one can be made to fail. Two devices.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "host/cuda_api.hpp"

namespace {

using namespace deepcomm::host::cu;

constexpr int kNumDevices = 2;
constexpr int kGranularity = 1 << 16;
constexpr Result kInvalidValue = 1, kInvalidContext = 201, kUnknown = 999;

struct Launch {
    unsigned grid, block, shared_bytes;
    uint64_t stream;
    int32_t first_word;
    bool is_early;
};

std::mutex mutex;
std::map<std::pair<int, int>, int> attributes;
std::map<std::string, Result> failures;
std::set<std::string> hidden;
std::map<std::string, int> live;
std::vector<std::string> calls;
int fail_at = -1;
int params_bytes = 16;
int peer_access = 1;
int driver_version = 13000;
Launch last_launch{};
thread_local std::vector<Context> contexts;

/// Counts a call that can fail, and says how it ends.
Result begin(const char* name, bool needs_context = true) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (needs_context && contexts.empty()) {
        return kInvalidContext;
    }
    calls.emplace_back(name);
    const auto failure = failures.find(name);
    if (failure != failures.end()) {
        return failure->second;
    }
    return fail_at >= 0 && fail_at-- == 0 ? kUnknown : kSuccess;
}

Result count(const char* kind, int change) {
    const std::lock_guard<std::mutex> lock(mutex);
    live[kind] += change;
    return live[kind] < 0 ? kInvalidValue : kSuccess;
}

#define BEGIN(...)                                                  \
    if (const Result code = begin(__VA_ARGS__); code != kSuccess) { \
        return code;                                                \
    }

Result cuInit(unsigned) { return begin("cuInit", false); }
Result cuDriverGetVersion(int* version) {
    *version = driver_version;
    return kSuccess;
}
Result cuGetErrorName(Result error, const char** text) {
    *text = error == kOutOfMemory ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_FAKE";
    return kSuccess;
}
Result cuGetErrorString(Result error, const char** text) {
    *text = error == kOutOfMemory ? "out of memory" : "as the test wants it";
    return kSuccess;
}

Result cuDeviceGetCount(int* count) {
    *count = kNumDevices;
    return begin("cuDeviceGetCount", false);
}
Result cuDeviceGet(Device* device, int ordinal) {
    *device = ordinal;
    return ordinal < kNumDevices ? kSuccess : kInvalidValue;
}
Result cuDeviceGetName(char* name, int size, Device) {
    std::strncpy(name, "Fake GPU", static_cast<size_t>(size));
    return kSuccess;
}
Result cuDeviceGetUuid(Uuid* uuid, Device device) {
    std::memset(uuid->bytes, 0xD0 + device, sizeof(uuid->bytes));
    return kSuccess;
}
Result cuDeviceGetAttribute(int* value, int attribute, Device device) {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto entry = attributes.find({device, attribute});
    const std::map<int, int> defaults{
        {kNumSms, 4}, {kCapabilityMajor, 9}, {kVirtualMemorySupported, 1}, {kPosixFdSupported, 1}};
    const auto usual = defaults.find(attribute);
    *value = entry != attributes.end() ? entry->second
             : usual != defaults.end() ? usual->second
                                       : 0;
    return kSuccess;
}
Result cuDeviceCanAccessPeer(int* can_access, Device, Device) {
    *can_access = peer_access;
    return kSuccess;
}

Result cuDevicePrimaryCtxRetain(Context* context, Device device) {
    BEGIN("cuDevicePrimaryCtxRetain", false)
    *context = reinterpret_cast<Context>(static_cast<uintptr_t>(0x1000 + device));
    return count("context", 1);
}
Result cuDevicePrimaryCtxRelease(Device) { return count("context", -1); }
Result cuDevicePrimaryCtxGetState(Device, unsigned* flags, int* active) {
    *flags = 0;
    *active = live["context"] > 0 ? 1 : 0;
    return kSuccess;
}
Result cuCtxGetCurrent(Context* context) {
    *context = contexts.empty() ? nullptr : contexts.back();
    return begin("cuCtxGetCurrent", false);
}
Result cuCtxPushCurrent(Context context) {
    // Not one of the calls that fake_fail_after counts: cleaning up needs it as well.
    if (failures.count("cuCtxPushCurrent") != 0) {
        return failures["cuCtxPushCurrent"];
    }
    contexts.push_back(context);
    return kSuccess;
}
Result cuCtxPopCurrent(Context* context) {
    if (contexts.empty()) {
        return kInvalidContext;
    }
    *context = contexts.back();
    contexts.pop_back();
    return kSuccess;
}

Result cuMemGetInfo(size_t* free, size_t* total) {
    *free = 3 << 20;
    *total = 8 << 20;
    return kSuccess;
}
Result cuMemAllocAsync(DevicePtr* address, size_t num_bytes, Stream) {
    BEGIN("cuMemAllocAsync")
    *address = reinterpret_cast<DevicePtr>(std::malloc(num_bytes));
    return count("device memory", 1);
}
Result cuMemFreeAsync(DevicePtr address, Stream) {
    std::free(reinterpret_cast<void*>(address));
    return count("device memory", contexts.empty() ? 0 : -1);
}
Result cuMemHostAlloc(void** address, size_t num_bytes, unsigned flags) {
    BEGIN("cuMemHostAlloc")
    if (flags != (kHostPortable | kHostDeviceMap)) {
        return kInvalidValue;
    }
    *address = std::malloc(num_bytes);
    std::memset(*address, 0xEE, num_bytes);
    return count("host memory", 1);
}
Result cuMemHostGetDevicePointer(DevicePtr* address, void* host_address, unsigned) {
    BEGIN("cuMemHostGetDevicePointer")
    *address = reinterpret_cast<DevicePtr>(host_address);
    return kSuccess;
}
Result cuMemFreeHost(void* address) {
    std::free(address);
    return count("host memory", contexts.empty() ? 0 : -1);
}
Result cuMemsetD8Async(DevicePtr address, unsigned char value, size_t num_bytes, Stream) {
    BEGIN("cuMemsetD8Async")
    std::memset(reinterpret_cast<void*>(address), value, num_bytes);
    return kSuccess;
}
Result cuMemcpyHtoDAsync(DevicePtr to, const void* from, size_t num_bytes, Stream) {
    BEGIN("cuMemcpyHtoDAsync")
    std::memcpy(reinterpret_cast<void*>(to), from, num_bytes);
    return kSuccess;
}

Result cuMemGetAllocationGranularity(size_t* granularity, const AllocationProperties*, int) {
    BEGIN("cuMemGetAllocationGranularity", false)
    *granularity = kGranularity;
    return kSuccess;
}
Result cuMemCreate(AllocationHandle* handle, size_t num_bytes,
                   const AllocationProperties* properties, unsigned long long) {
    BEGIN("cuMemCreate", false)
    if (num_bytes % kGranularity != 0 || properties->location.type != kOnDevice) {
        return kInvalidValue;
    }
    const int fd = memfd_create("fake", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, static_cast<off_t>(num_bytes)) != 0) {
        return kOutOfMemory;
    }
    *handle = static_cast<AllocationHandle>(fd);
    return count("allocation", 1);
}
Result cuMemRelease(AllocationHandle handle) {
    close(static_cast<int>(handle));
    return count("allocation", -1);
}
Result cuMemExportToShareableHandle(void* shareable, AllocationHandle handle, int type,
                                    unsigned long long) {
    BEGIN("cuMemExportToShareableHandle", false)
    const auto fd = static_cast<int>(handle);
    if (type == kPosixFd) {
        *static_cast<int*>(shareable) = dup(fd);
        return kSuccess;
    }
    const int words[2] = {getpid(), fd};  // the fabric of this one host
    std::memcpy(shareable, words, sizeof(words));
    return kSuccess;
}
Result cuMemImportFromShareableHandle(AllocationHandle* handle, void* shareable, int type) {
    BEGIN("cuMemImportFromShareableHandle", false)
    auto fd = static_cast<int>(reinterpret_cast<uintptr_t>(shareable));
    if (type == kFabric) {
        int words[2];
        std::memcpy(words, shareable, sizeof(words));
        const std::string path =
            "/proc/" + std::to_string(words[0]) + "/fd/" + std::to_string(words[1]);
        fd = open(path.c_str(), O_RDWR | O_CLOEXEC);
    } else {
        fd = dup(fd);
    }
    *handle = static_cast<AllocationHandle>(fd);
    return fd < 0 ? kInvalidValue : count("allocation", 1);
}
Result cuMemAddressReserve(DevicePtr* address, size_t num_bytes, size_t, DevicePtr,
                           unsigned long long) {
    BEGIN("cuMemAddressReserve", false)
    void* const begin = mmap(nullptr, num_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    *address = reinterpret_cast<DevicePtr>(begin);
    return begin == MAP_FAILED ? kOutOfMemory : count("reservation", 1);
}
Result cuMemAddressFree(DevicePtr address, size_t num_bytes) {
    munmap(reinterpret_cast<void*>(address), num_bytes);
    return count("reservation", -1);
}
Result cuMemMap(DevicePtr address, size_t num_bytes, size_t, AllocationHandle handle,
                unsigned long long) {
    BEGIN("cuMemMap", false)
    void* const at = mmap(reinterpret_cast<void*>(address), num_bytes, PROT_NONE,
                          MAP_SHARED | MAP_FIXED, static_cast<int>(handle), 0);
    return at == MAP_FAILED ? kInvalidValue : count("mapping", 1);
}
Result cuMemUnmap(DevicePtr address, size_t num_bytes) {
    mmap(reinterpret_cast<void*>(address), num_bytes, PROT_NONE,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    return count("mapping", -1);
}
Result cuMemSetAccess(DevicePtr address, size_t num_bytes, const AccessDescription* description,
                      size_t) {
    BEGIN("cuMemSetAccess", false)
    if (description->flags != kReadWrite) {
        return kInvalidValue;
    }
    mprotect(reinterpret_cast<void*>(address), num_bytes, PROT_READ | PROT_WRITE);
    return kSuccess;
}

Result cuStreamCreateWithPriority(Stream* stream, unsigned flags, int) {
    BEGIN("cuStreamCreateWithPriority")
    static uintptr_t next = 0x5000;
    *stream = reinterpret_cast<Stream>(next++);
    return flags == kNonBlocking ? count("stream", 1) : kInvalidValue;
}
Result cuCtxSynchronize() { return begin("cuCtxSynchronize"); }
Result cuStreamSynchronize(Stream) { return begin("cuStreamSynchronize", false); }
Result cuStreamDestroy(Stream) { return count("stream", -1); }

Result cuModuleLoadDataEx(Module* module, const void* image, unsigned, int*, void**) {
    BEGIN("cuModuleLoadDataEx")
    *module = reinterpret_cast<Module>(const_cast<void*>(image));
    return count("module", 1);
}
Result cuModuleUnload(Module) { return count("module", contexts.empty() ? 0 : -1); }
Result cuModuleGetFunction(Function* function, Module module, const char*) {
    BEGIN("cuModuleGetFunction")
    *function = reinterpret_cast<Function>(module);
    return kSuccess;
}
Result cuFuncGetAttribute(int* value, int attribute, Function) {
    BEGIN("cuFuncGetAttribute")
    *value = attribute == kStaticSharedBytes ? 512 : 1024;
    return kSuccess;
}
Result cuFuncSetAttribute(Function, int, int) { return begin("cuFuncSetAttribute"); }
Result cuOccupancyMaxActiveBlocksPerMultiprocessor(int* num_blocks, Function, int block_size,
                                                   size_t) {
    BEGIN("cuOccupancyMaxActiveBlocksPerMultiprocessor")
    *num_blocks = 2048 / block_size;
    return kSuccess;
}
Result cuFuncLoad(Function) { return begin("cuFuncLoad"); }
Result cuFuncGetParamInfo(Function, size_t, size_t* offset, size_t* num_bytes) {
    BEGIN("cuFuncGetParamInfo")
    *offset = 0;
    *num_bytes = static_cast<size_t>(params_bytes);
    return kSuccess;
}
Result cuLaunchKernelEx(const LaunchConfig* config, Function, void** params, void**) {
    BEGIN("cuLaunchKernelEx")
    last_launch = {config->grid[0],
                   config->block[0],
                   config->shared_bytes,
                   reinterpret_cast<uint64_t>(config->stream),
                   *static_cast<int32_t*>(params[0]),
                   config->num_attributes == 1 &&
                       config->attributes->id == kProgrammaticStreamSerialization &&
                       config->attributes->value == 1};
    return kSuccess;
}

}  // namespace

extern "C" {

Result cuGetProcAddress_v2(const char* name, void** function, int, uint64_t, int*) {
#define DEEPCOMM_FAKE_ENTRY(name, parameters) {#name, reinterpret_cast<void*>(&name)},
    static const std::map<std::string, void*> functions{DEEPCOMM_CUDA_FUNCTIONS(
        DEEPCOMM_FAKE_ENTRY) DEEPCOMM_CUDA_OPTIONAL_FUNCTIONS(DEEPCOMM_FAKE_ENTRY)};
    const auto entry = functions.find(name);
    if (entry == functions.end() || hidden.count(name) != 0) {
        return kInvalidValue;
    }
    *function = entry->second;
    return kSuccess;
}

/// Makes a device's context current in this thread, as torch does; with -1 none is.
void fake_make_current(int device) {
    contexts.clear();
    if (device >= 0) {
        contexts.push_back(reinterpret_cast<Context>(static_cast<uintptr_t>(0x1000 + device)));
    }
}

/// Everything as at first, except what lives.
void fake_reset() {
    const std::lock_guard<std::mutex> lock(mutex);
    attributes.clear();
    failures.clear();
    hidden.clear();
    calls.clear();
    fail_at = -1;
    params_bytes = 16;
    peer_access = 1;
    driver_version = 13000;
}
void fake_set_attribute(int device, int attribute, int value) {
    attributes[{device, attribute}] = value;
}
void fake_set_peer_access(int value) { peer_access = value; }
void fake_set_driver_version(int value) { driver_version = value; }
/// The call after the next num_calls fails.
void fake_fail_after(int num_calls) { fail_at = num_calls; }
/// Whether a call has failed since fake_fail_after.
int fake_has_failed() { return fail_at < 0 ? 1 : 0; }
void fake_fail_call(const char* name, int code) { failures[name] = code; }
void fake_hide(const char* name) { hidden.insert(name); }
int fake_num_calls(const char* name) {
    int number = 0;
    for (const std::string& call : calls) {
        number += call == name ? 1 : 0;
    }
    return number;
}
int fake_live(const char* kind) {
    const std::lock_guard<std::mutex> lock(mutex);
    return live[kind];
}
/// Grid, block, shared memory, stream and the first word of the arguments.
void fake_last_launch(int64_t* values) {
    values[0] = last_launch.grid;
    values[1] = last_launch.block;
    values[2] = last_launch.shared_bytes;
    values[3] = static_cast<int64_t>(last_launch.stream);
    values[4] = last_launch.first_word;
    values[5] = last_launch.is_early ? 1 : 0;
}
}
