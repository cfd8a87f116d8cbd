// SPDX-License-Identifier: Apache-2.0
#include "host/symmetric_heap.hpp"

#include <atomic>

#include "host/put_off.hpp"

namespace deepcomm::host {

struct SymmetricHeap::Mappings {
    std::shared_ptr<Device> device;
    std::shared_ptr<Mapping> own;
    std::vector<std::shared_ptr<Mapping>> peers;
    std::vector<cu::Stream> streams;  ///< whose work may use leased memory after the heap is closed
    std::atomic<bool> is_closed{false};

    ~Mappings() {
        // cuMemUnmap waits for nothing by itself.
        for (const cu::Stream stream : streams) {
            DEEPCOMM_CUDA_LOG(device->driver(), cuStreamSynchronize(stream));
        }
        // A heap that nobody has closed is dropped while kernels may still use it, on any stream.
        if (!is_closed) put_off(device, [own = own, peers = peers](const Device&) {});
    }
};

SymmetricHeap::SymmetricHeap(std::shared_ptr<Device> device, int64_t num_bytes)
    : device_(std::move(device)),
      memory_(PhysicalMemory::create(device_, num_bytes)),
      num_bytes_(memory_->num_bytes()),
      mappings_(std::make_shared<Mappings>()),
      counts_(std::make_shared<LeaseCounts>()) {
    mappings_->device = device_;
    mappings_->own = std::make_shared<Mapping>(device_, memory_);
    device_->zero(mappings_->own->address(), num_bytes_);
}

cu::DevicePtr SymmetricHeap::base() const {
    return mappings_ == nullptr ? 0 : mappings_->own->address();
}

std::shared_ptr<Mapping> SymmetricHeap::mapping() const {
    return mappings_ == nullptr ? nullptr : mappings_->own;
}

cu::DevicePtr SymmetricHeap::map(std::shared_ptr<PhysicalMemory> peer) {
    return add(std::make_shared<Mapping>(device_, std::move(peer)));
}

cu::DevicePtr SymmetricHeap::join(std::shared_ptr<Mapping> peer) {
    peer->allow(*device_);
    return add(std::move(peer));
}

cu::DevicePtr SymmetricHeap::add(std::shared_ptr<Mapping> peer) {
    DEEPCOMM_CHECK_ARG(mappings_ != nullptr, "map: expected an open heap, got a closed one");
    mappings_->peers.push_back(std::move(peer));
    return mappings_->peers.back()->address();
}

std::shared_ptr<SymmetricHeap::Lease> SymmetricHeap::lease(int64_t generation, int64_t offset,
                                                           int64_t num_bytes) {
    DEEPCOMM_CHECK_ARG(mappings_ != nullptr, "lease: expected an open heap, got a closed one");
    DEEPCOMM_CHECK_ARG(offset >= 0 && num_bytes >= 0 && num_bytes <= num_bytes_ - offset,
                       "lease: expected bytes in [0, %lld), got [%lld, %lld)",
                       static_cast<long long>(num_bytes_), static_cast<long long>(offset),
                       static_cast<long long>(offset + num_bytes));
    const cu::DevicePtr address = base() + static_cast<cu::DevicePtr>(offset);
    return std::shared_ptr<Lease>(new Lease(mappings_, counts_, generation, address));
}

int64_t SymmetricHeap::num_leases(int64_t generation) const {
    const std::lock_guard<std::mutex> lock(counts_->mutex);
    const auto entry = counts_->by_generation.find(generation);
    return entry == counts_->by_generation.end() ? 0 : entry->second;
}

void SymmetricHeap::close(std::vector<cu::Stream> streams) {
    if (mappings_ != nullptr) {
        mappings_->streams = std::move(streams);
        mappings_->is_closed = true;
        mappings_.reset();
        memory_.reset();
    }
}

SymmetricHeap::Lease::Lease(std::shared_ptr<Mappings> mappings, std::shared_ptr<LeaseCounts> counts,
                            int64_t generation, cu::DevicePtr address)
    : mappings_(std::move(mappings)),
      counts_(std::move(counts)),
      generation_(generation),
      address_(address) {
    const std::lock_guard<std::mutex> lock(counts_->mutex);
    ++counts_->by_generation[generation_];
}

SymmetricHeap::Lease::~Lease() {
    // The end of the mappings waits for streams.
    if (mappings_->is_closed) {
        put_off(mappings_->device, [mappings = mappings_](const Device&) {});
    }
    const std::lock_guard<std::mutex> lock(counts_->mutex);
    if (--counts_->by_generation[generation_] == 0) {
        counts_->by_generation.erase(generation_);
    }
}

}  // namespace deepcomm::host
