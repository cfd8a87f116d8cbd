// SPDX-License-Identifier: Apache-2.0
#include "host/put_off.hpp"

#include <mutex>
#include <utility>
#include <vector>

namespace deepcomm::host {

namespace {

struct PutOff {
    std::mutex mutex;
    std::vector<std::function<void()>> frees;
};

PutOff& all() {
    // Never destroyed: at the end of the process the driver is gone, and frees everything itself.
    static auto* const put_off = new PutOff;
    return *put_off;
}

}  // namespace

void put_off(std::function<void()> free) {
    const std::lock_guard<std::mutex> lock(all().mutex);
    all().frees.push_back(std::move(free));
}

void free_put_off() {
    std::vector<std::function<void()>> now;
    {
        const std::lock_guard<std::mutex> lock(all().mutex);
        now.swap(all().frees);
    }
    for (const auto& free : now) {
        free();
    }
}

}  // namespace deepcomm::host
