// SPDX-License-Identifier: Apache-2.0
// The part of a driver that the plugin uses, without a GPU: copies happen late, each stream's in
// order and one stream's against another's in any, one step a query. Device memory is the host's.
// What a real driver would refuse or do slowly ends the process, with a line that says so.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <random>
#include <set>

namespace {

using Address = unsigned long long;
constexpr int kSuccess = 0, kNotReady = 600;

struct Event {
    int num_pending = 0;
};

struct Step {
    Address to = 0, from = 0;
    size_t num_bytes = 0;
    Event* event = nullptr;  // instead of a copy
};

struct Stream {
    std::deque<Step> steps;
};

std::mutex mutex;
std::set<Stream*> streams;
std::map<Address, size_t> pinned;
std::minstd_rand random_numbers(std::random_device{}());
thread_local int depth = 0;

void require(bool condition, const char* what) {
    if (!condition) {
        std::fprintf(stderr, "late driver: %s\n", what);
        std::abort();
    }
}

bool is_pinned(Address address, size_t num_bytes) {
    auto after = pinned.upper_bound(address);
    return after != pinned.begin() && (--after)->first + after->second >= address + num_bytes;
}

void step(Stream& stream) {
    const Step next = stream.steps.front();
    stream.steps.pop_front();
    if (next.event != nullptr) {
        --next.event->num_pending;
    } else {
        std::memcpy(reinterpret_cast<void*>(next.to), reinterpret_cast<void*>(next.from),
                    next.num_bytes);
    }
}

}  // namespace

extern "C" {

int cuInit(unsigned) { return kSuccess; }
int cuDeviceGet(int* device, int ordinal) { return (*device = ordinal, kSuccess); }
int cuPointerGetAttribute(void* value, int, Address) {
    return (*static_cast<int*>(value) = 0, kSuccess);
}
int cuCtxCreate_v2(void** context, unsigned, int) {
    ++depth;
    return (*context = &streams, kSuccess);
}
int cuCtxDestroy_v2(void*) {
    const std::lock_guard<std::mutex> lock(mutex);
    require(streams.empty() && pinned.empty(), "something is left");
    return kSuccess;
}
int cuCtxPushCurrent_v2(void*) { return (++depth, kSuccess); }
int cuCtxPopCurrent_v2(void**) { return (--depth, kSuccess); }

int cuMemHostRegister_v2(void* address, size_t num_bytes, unsigned) {
    const std::lock_guard<std::mutex> lock(mutex);
    require(depth > 0, "no context");
    require(reinterpret_cast<Address>(address) % 4096 == 0, "memory that does not begin a page");
    pinned[reinterpret_cast<Address>(address)] = num_bytes;
    return kSuccess;
}
int cuMemHostUnregister(void* address) {
    const std::lock_guard<std::mutex> lock(mutex);
    require(pinned.erase(reinterpret_cast<Address>(address)) == 1, "memory never registered");
    return kSuccess;
}

int cuStreamCreate(void** stream, unsigned) {
    const std::lock_guard<std::mutex> lock(mutex);
    require(depth > 0, "no context");
    *stream = *streams.insert(new Stream).first;
    return kSuccess;
}
int cuStreamSynchronize(void* stream) {
    const std::lock_guard<std::mutex> lock(mutex);
    auto& waited_for = *static_cast<Stream*>(stream);
    while (!waited_for.steps.empty()) {
        step(waited_for);
    }
    return kSuccess;
}
int cuStreamDestroy_v2(void* stream) {
    const std::lock_guard<std::mutex> lock(mutex);
    auto* const ended = static_cast<Stream*>(stream);
    require(ended->steps.empty(), "a stream that ends with copies under way");
    streams.erase(ended);
    delete ended;
    return kSuccess;
}

int cuEventCreate(void** event, unsigned) { return (*event = new Event, kSuccess); }
int cuEventDestroy_v2(void* event) { return (delete static_cast<Event*>(event), kSuccess); }
int cuEventRecord(void* event, void* stream) {
    const std::lock_guard<std::mutex> lock(mutex);
    auto* const recorded = static_cast<Event*>(event);
    ++recorded->num_pending;
    static_cast<Stream*>(stream)->steps.push_back({0, 0, 0, recorded});
    return kSuccess;
}
int cuEventQuery(void* event) {
    const std::lock_guard<std::mutex> lock(mutex);
    require(depth > 0, "no context");
    for (Stream* stream : streams) {
        if (!stream->steps.empty() && random_numbers() % 2 == 0) {
            step(*stream);
        }
    }
    return static_cast<Event*>(event)->num_pending == 0 ? kSuccess : kNotReady;
}
int cuMemcpyAsync(Address to, Address from, size_t num_bytes, void* stream) {
    const std::lock_guard<std::mutex> lock(mutex);
    require(depth > 0, "no context");
    require(is_pinned(to, num_bytes) || is_pinned(from, num_bytes), "a copy that would block");
    static_cast<Stream*>(stream)->steps.push_back({to, from, num_bytes, nullptr});
    return kSuccess;
}
}
