// SPDX-License-Identifier: Apache-2.0
#include "host/driver.hpp"

#include <dlfcn.h>

#include <cstdio>

namespace deepcomm::host {

namespace {

using FindFunction = cu::Result (*)(const char* name, void** function, int version, uint64_t flags,
                                    int* status);

constexpr char kFinder[] = "cuGetProcAddress_v2";  // of CUDA 12.0

FindFunction open_library(const std::string& path) {
    void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        throw CudaError(
            format("%s cannot be opened: %s; install the NVIDIA driver (containers: docker run "
                   "--gpus all)",
                   path.c_str(), dlerror()));
    }
    void* const finder = dlsym(library, kFinder);
    if (finder == nullptr) {
        throw CudaError(format("%s: expected a driver of CUDA 12.0 or newer, got one without %s",
                               path.c_str(), kFinder));
    }
    return reinterpret_cast<FindFunction>(finder);
}

void* find(FindFunction finder, const char* name, int version) {
    void* function = nullptr;
    int status = 0;
    const cu::Result code = finder(name, &function, version, cu::kLegacyStream, &status);
    return code == cu::kSuccess ? function : nullptr;
}

template <typename Pointer>
void find_required(FindFunction finder, const char* name, Pointer& function) {
    function = reinterpret_cast<Pointer>(find(finder, name, cu::kApiVersion));
    if (function == nullptr) {
        throw CudaError(
            format("expected a driver of CUDA 12.0 or newer, got one without %s", name));
    }
}

}  // namespace

std::shared_ptr<Driver> Driver::open(const std::string& path) {
    return std::shared_ptr<Driver>(new Driver(path));
}

Driver::Driver(const std::string& path) {
    const FindFunction finder = open_library(path);
#define DEEPCOMM_FIND_REQUIRED(name, parameters) find_required(finder, #name, api_.name);
#define DEEPCOMM_FIND_OPTIONAL(name, parameters) \
    api_.name = reinterpret_cast<decltype(api_.name)>(find(finder, #name, cu::kNewestApiVersion));
    DEEPCOMM_CUDA_FUNCTIONS(DEEPCOMM_FIND_REQUIRED)
    DEEPCOMM_CUDA_OPTIONAL_FUNCTIONS(DEEPCOMM_FIND_OPTIONAL)
#undef DEEPCOMM_FIND_REQUIRED
#undef DEEPCOMM_FIND_OPTIONAL
    DEEPCOMM_CUDA_CHECK(*this, cuInit(0));
}

int Driver::version() const {
    int version = 0;
    DEEPCOMM_CUDA_CHECK(*this, cuDriverGetVersion(&version));
    return version;
}

int Driver::num_devices() const {
    int count = 0;
    DEEPCOMM_CUDA_CHECK(*this, cuDeviceGetCount(&count));
    return count;
}

int Driver::attribute(int device, int attribute) const {
    int value = 0;
    DEEPCOMM_CUDA_CHECK(*this, cuDeviceGetAttribute(&value, attribute, device));
    return value;
}

std::string Driver::device_name(int device) const {
    char name[256] = "";
    DEEPCOMM_CUDA_CHECK(*this, cuDeviceGetName(name, sizeof(name), device));
    return name;
}

std::string Driver::device_uuid(int device) const {
    cu::Uuid uuid{};
    DEEPCOMM_CUDA_CHECK(*this, cuDeviceGetUuid(&uuid, device));
    std::string text;
    for (const unsigned char byte : uuid.bytes) {
        text += format("%02x", byte);
    }
    return text;
}

bool Driver::can_access_peer(int device, int peer) const {
    int can_access = 0;
    DEEPCOMM_CUDA_CHECK(*this, cuDeviceCanAccessPeer(&can_access, device, peer));
    return can_access != 0;
}

bool Driver::has_context(int device) const {
    unsigned flags = 0;
    int is_active = 0;
    DEEPCOMM_CUDA_CHECK(*this, cuDevicePrimaryCtxGetState(device, &flags, &is_active));
    return is_active != 0;
}

void Driver::check(cu::Result code, const char* call, const std::string& detail) const {
    if (code != cu::kSuccess) {
        throw CudaError(describe(code, call) + (detail.empty() ? "" : "; " + detail));
    }
}

bool Driver::log(cu::Result code, const char* call) const noexcept {
    if (code != cu::kSuccess && code != cu::kDeinitialized) {
        std::fprintf(stderr, "deepcomm: %s\n", describe(code, call).c_str());
    }
    return code == cu::kSuccess;
}

std::string Driver::describe(cu::Result code, const char* call) const {
    const char* name = nullptr;
    const char* meaning = nullptr;
    api_.cuGetErrorName(code, &name);
    api_.cuGetErrorString(code, &meaning);
    return format("%s failed: %d %s (%s)", call, code, name == nullptr ? "unknown" : name,
                  meaning == nullptr ? "no description" : meaning);
}

}  // namespace deepcomm::host
