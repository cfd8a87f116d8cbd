// SPDX-License-Identifier: Apache-2.0
#include "host/memory.hpp"

#include <cstring>

#include "host/put_off.hpp"

namespace deepcomm::host {

DeviceMemory::DeviceMemory(std::shared_ptr<Device> device, int64_t num_bytes)
    : device_(std::move(device)), num_bytes_(num_bytes) {
    DEEPCOMM_CHECK_ARG(num_bytes > 0, "num_bytes: expected more than 0, got %lld",
                       static_cast<long long>(num_bytes));
    const Device::Current current(*device_);
    // NOTE: in the order of a stream: cuMemAlloc and cuMemFree may wait for kernels of other ranks
    // on this device, which may wait for this rank.
    DEEPCOMM_CUDA_CHECK(
        device_->driver(),
        cuMemAllocAsync(&address_, static_cast<size_t>(num_bytes), device_->setup_stream()));
    try {
        device_->zero(address_, num_bytes);
    } catch (const Error&) {
        free(*device_, address_);
        throw;
    }
}

DeviceMemory::~DeviceMemory() {
    put_off(device_, [address = address_](const Device& device) { free(device, address); });
}

void DeviceMemory::free(const Device& device, cu::DevicePtr address) noexcept {
    const Device::Current current(device, std::nothrow);
    DEEPCOMM_CUDA_LOG(device.driver(), cuMemFreeAsync(address, device.setup_stream()));
}

void DeviceMemory::copy_from_host(const void* from, int64_t num_bytes) {
    DEEPCOMM_CHECK_ARG(num_bytes <= num_bytes_, "content: expected at most %lld bytes, got %lld",
                       static_cast<long long>(num_bytes_), static_cast<long long>(num_bytes));
    device_->copy_from_host(address_, from, num_bytes);
}

HostMemory::HostMemory(std::shared_ptr<Device> device, int64_t num_bytes)
    : device_(std::move(device)), num_bytes_(num_bytes) {
    DEEPCOMM_CHECK_ARG(num_bytes > 0, "num_bytes: expected more than 0, got %lld",
                       static_cast<long long>(num_bytes));
    const Device::Current current(*device_);
    DEEPCOMM_CUDA_CHECK(device_->driver(), cuMemHostAlloc(&address_, static_cast<size_t>(num_bytes),
                                                          cu::kHostPortable | cu::kHostDeviceMap));
    try {
        DEEPCOMM_CUDA_CHECK(device_->driver(),
                            cuMemHostGetDevicePointer(&device_address_, address_, 0));
    } catch (const Error&) {
        free(*device_, address_);
        throw;
    }
    std::memset(address_, 0, static_cast<size_t>(num_bytes));
}

HostMemory::~HostMemory() {
    put_off(device_, [address = address_](const Device& device) { free(device, address); });
}

void HostMemory::free(const Device& device, void* address) noexcept {
    const Device::Current current(device, std::nothrow);
    DEEPCOMM_CUDA_LOG(device.driver(), cuMemFreeHost(address));
}

}  // namespace deepcomm::host
