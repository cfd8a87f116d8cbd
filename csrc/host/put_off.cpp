// SPDX-License-Identifier: Apache-2.0
#include "host/put_off.hpp"

#include <mutex>
#include <set>
#include <utility>
#include <vector>

namespace deepcomm::host {

namespace {

struct Free {
    std::shared_ptr<Device> device;
    std::function<void(const Device&)> run;
};

struct PutOff {
    std::mutex mutex;
    std::vector<Free> frees;
};

PutOff& all() {
    // Never destroyed: at the end of the process the driver is gone, and frees everything itself.
    static auto* const put_off = new PutOff;
    return *put_off;
}

}  // namespace

void put_off(std::shared_ptr<Device> device, std::function<void(const Device&)> free) {
    const std::lock_guard<std::mutex> lock(all().mutex);
    all().frees.push_back({std::move(device), std::move(free)});
}

void free_put_off() {
    std::vector<Free> now;
    {
        const std::lock_guard<std::mutex> lock(all().mutex);
        now.swap(all().frees);
    }
    std::set<const Device*> awaited;
    for (const Free& free : now) {
        if (!awaited.insert(free.device.get()).second) continue;
        const Device::Current current(*free.device, std::nothrow);
        DEEPCOMM_CUDA_LOG(free.device->driver(), cuCtxSynchronize());
    }
    for (const Free& free : now) {
        free.run(*free.device);
    }
}

}  // namespace deepcomm::host
