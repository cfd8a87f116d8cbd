// SPDX-License-Identifier: Apache-2.0
#include "device.hpp"

#include <dlfcn.h>

#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "log.hpp"

namespace loopback {

namespace {

constexpr int kSuccess = 0, kNotReady = 600;
constexpr int kDeviceOrdinal = 9;  // CUpointer_attribute
constexpr unsigned kUsualContext = 0;
constexpr unsigned kPortable = 1;       // CU_MEMHOSTREGISTER
constexpr unsigned kNonBlocking = 1;    // stream: never waits for the default stream
constexpr unsigned kDisableTiming = 2;  // event

}  // namespace

using Address = unsigned long long;

// X(name in the library, parameters)
#define LOOPBACK_DRIVER_FUNCTIONS(X)                                           \
    X(cuInit, (unsigned flags))                                                \
    X(cuDeviceGet, (int* device, int ordinal))                                 \
    X(cuCtxCreate_v2, (void** context, unsigned flags, int device))            \
    X(cuCtxDestroy_v2, (void* context))                                        \
    X(cuCtxPushCurrent_v2, (void* context))                                    \
    X(cuCtxPopCurrent_v2, (void** context))                                    \
    X(cuPointerGetAttribute, (void* value, int attribute, Address address))    \
    X(cuMemHostRegister_v2, (void* address, size_t num_bytes, unsigned flags)) \
    X(cuMemHostUnregister, (void* address))                                    \
    X(cuStreamCreate, (void** stream, unsigned flags))                         \
    X(cuStreamDestroy_v2, (void* stream))                                      \
    X(cuStreamSynchronize, (void* stream))                                     \
    X(cuEventCreate, (void** event, unsigned flags))                           \
    X(cuEventDestroy_v2, (void* event))                                        \
    X(cuEventRecord, (void* event, void* stream))                              \
    X(cuEventQuery, (void* event))                                             \
    X(cuMemcpyAsync, (Address to, Address from, size_t num_bytes, void* stream))

struct Driver {
#define LOOPBACK_MEMBER(name, parameters) int(*name) parameters = nullptr;
    LOOPBACK_DRIVER_FUNCTIONS(LOOPBACK_MEMBER)
#undef LOOPBACK_MEMBER

    Driver() {
        const std::string path = text_setting("DEEPCOMM_LOOPBACK_CUDA", "libcuda.so.1");
        void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr) {
            throw std::runtime_error(std::string("no driver: ") + dlerror());
        }
#define LOOPBACK_LOAD(name, parameters)                                   \
    name = reinterpret_cast<decltype(name)>(dlsym(library, #name));       \
    if (name == nullptr) {                                                \
        throw std::runtime_error(std::string("driver without ") + #name); \
    }
        LOOPBACK_DRIVER_FUNCTIONS(LOOPBACK_LOAD)
#undef LOOPBACK_LOAD
        cuInit(0);
    }

    static const Driver& get() {
        static const Driver driver;
        return driver;
    }
};

namespace {

void check(int code, const char* call) {
    if (code != kSuccess) {
        throw std::runtime_error(std::string(call) + ": error " + std::to_string(code));
    }
}

/// The context on a GPU that a process's communicators share. Making one takes up to seconds where hosts
/// have many GPUs, and NCCL makes several communicators of a network; it ends with the last of them.
std::shared_ptr<void> context_on(const Driver& driver, int ordinal) {
    static std::mutex mutex;
    static std::map<int, std::weak_ptr<void>> contexts;
    const std::lock_guard<std::mutex> lock(mutex);
    std::weak_ptr<void>& known = contexts[ordinal];
    std::shared_ptr<void> shared = known.lock();
    if (shared == nullptr) {
        int device;
        void* made;
        check(driver.cuDeviceGet(&device, ordinal), "cuDeviceGet");
        check(driver.cuCtxCreate_v2(&made, kUsualContext, device), "cuCtxCreate");
        void* popped;
        driver.cuCtxPopCurrent_v2(&popped);
        shared.reset(made, [&driver](void* context) { driver.cuCtxDestroy_v2(context); });
        known = shared;
    }
    return shared;
}

}  // namespace

Device::Device(const void* address) : driver_(Driver::get()) {
    check(driver_.cuPointerGetAttribute(&ordinal_, kDeviceOrdinal,
                                        reinterpret_cast<Address>(address)),
          "cuPointerGetAttribute");
    context_ = context_on(driver_, ordinal_);
}

Device::Scope::Scope(const Device& device) : driver_(device.driver_) {
    check(driver_.cuCtxPushCurrent_v2(device.context_.get()), "cuCtxPushCurrent");
}

Device::Scope::~Scope() {
    void* context;
    driver_.cuCtxPopCurrent_v2(&context);
}

Lane::Lane(const Device& device) : driver_(device.driver_) {
    check(driver_.cuStreamCreate(&stream_, kNonBlocking), "cuStreamCreate");
    check(driver_.cuEventCreate(&event_, kDisableTiming), "cuEventCreate");
}

Lane::~Lane() {
    driver_.cuStreamSynchronize(stream_);
    driver_.cuEventDestroy_v2(event_);
    driver_.cuStreamDestroy_v2(stream_);
}

void Lane::copy(void* to, const void* from, size_t num_bytes) {
    check(driver_.cuMemcpyAsync(reinterpret_cast<Address>(to), reinterpret_cast<Address>(from),
                                num_bytes, stream_),
          "cuMemcpyAsync");
}

void Lane::mark() { check(driver_.cuEventRecord(event_, stream_), "cuEventRecord"); }

bool Lane::is_done() {
    const int code = driver_.cuEventQuery(event_);
    if (code != kNotReady) {
        check(code, "cuEventQuery");
    }
    return code == kSuccess;
}

void Lane::wait() { check(driver_.cuStreamSynchronize(stream_), "cuStreamSynchronize"); }

Pinned::Pinned(const Device& device, void* address, size_t num_bytes)
    : driver_(device.driver_), address_(address) {
    check(driver_.cuMemHostRegister_v2(address, num_bytes, kPortable), "cuMemHostRegister");
}

Pinned::~Pinned() { driver_.cuMemHostUnregister(address_); }

}  // namespace loopback
