// SPDX-License-Identifier: Apache-2.0
#include "host/physical_memory.hpp"

#include <cstring>

#include "common/math.hpp"
#include "host/put_off.hpp"

namespace deepcomm::host {

namespace {

constexpr double kMiB = 1024.0 * 1024.0;

int64_t granularity_of(const Device& device, const cu::AllocationProperties& properties) {
    size_t granularity = 0;
    DEEPCOMM_CUDA_CHECK(device.driver(), cuMemGetAllocationGranularity(&granularity, &properties,
                                                                       cu::kMinimumGranularity));
    return static_cast<int64_t>(granularity);
}

/// What to say where an allocation fails; the driver itself names no sizes.
std::string shortage(const Device& device, int64_t num_bytes) {
    size_t free_bytes = 0;
    size_t total_bytes = 0;
    device.driver().api().cuMemGetInfo(&free_bytes, &total_bytes);
    return format("%s: %.0f MiB needed, %.0f of %.0f MiB free", device.label().c_str(),
                  static_cast<double>(num_bytes) / kMiB, static_cast<double>(free_bytes) / kMiB,
                  static_cast<double>(total_bytes) / kMiB);
}

}  // namespace

std::shared_ptr<PhysicalMemory> PhysicalMemory::create(std::shared_ptr<Device> device,
                                                       int64_t num_bytes) {
    DEEPCOMM_CHECK_ARG(num_bytes > 0, "num_bytes: expected more than 0, got %lld",
                       static_cast<long long>(num_bytes));
    free_put_off();  // before the allocation, which may need it
    const Device::Current current(*device);
    const auto properties = device->properties(device->handle_types());
    num_bytes = round_up(num_bytes, granularity_of(*device, properties));
    cu::AllocationHandle handle = 0;
    const cu::Result code =
        device->driver().api().cuMemCreate(&handle, static_cast<size_t>(num_bytes), &properties, 0);
    if (code != cu::kSuccess) {
        device->driver().check(code, "cuMemCreate", shortage(*device, num_bytes));
    }
    return std::shared_ptr<PhysicalMemory>(
        new PhysicalMemory(std::move(device), handle, num_bytes));
}

std::shared_ptr<PhysicalMemory> PhysicalMemory::import_fd(std::shared_ptr<Device> device, int fd,
                                                          int64_t num_bytes) {
    const Device::Current current(*device);
    cu::AllocationHandle handle = 0;
    auto* const shareable = reinterpret_cast<void*>(static_cast<uintptr_t>(fd));
    DEEPCOMM_CUDA_CHECK(device->driver(),
                        cuMemImportFromShareableHandle(&handle, shareable, cu::kPosixFd));
    return std::shared_ptr<PhysicalMemory>(
        new PhysicalMemory(std::move(device), handle, num_bytes));
}

std::shared_ptr<PhysicalMemory> PhysicalMemory::import_fabric(std::shared_ptr<Device> device,
                                                              const std::string& fabric,
                                                              int64_t num_bytes) {
    cu::FabricHandle shareable{};
    DEEPCOMM_CHECK_ARG(fabric.size() == sizeof(shareable), "fabric: expected %zu bytes, got %zu",
                       sizeof(shareable), fabric.size());
    std::memcpy(&shareable, fabric.data(), sizeof(shareable));
    const Device::Current current(*device);
    cu::AllocationHandle handle = 0;
    DEEPCOMM_CUDA_CHECK(device->driver(),
                        cuMemImportFromShareableHandle(&handle, &shareable, cu::kFabric));
    return std::shared_ptr<PhysicalMemory>(
        new PhysicalMemory(std::move(device), handle, num_bytes));
}

PhysicalMemory::~PhysicalMemory() { DEEPCOMM_CUDA_LOG(device_->driver(), cuMemRelease(handle_)); }

int PhysicalMemory::export_fd() const {
    int fd = -1;
    DEEPCOMM_CUDA_CHECK(device_->driver(),
                        cuMemExportToShareableHandle(&fd, handle_, cu::kPosixFd, 0));
    return fd;
}

std::string PhysicalMemory::export_fabric() const {
    cu::FabricHandle fabric{};
    DEEPCOMM_CUDA_CHECK(device_->driver(),
                        cuMemExportToShareableHandle(&fabric, handle_, cu::kFabric, 0));
    return {reinterpret_cast<const char*>(fabric.bytes), sizeof(fabric.bytes)};
}

AddressRange::AddressRange(std::shared_ptr<Device> device, int64_t num_bytes)
    : device_(std::move(device)), num_bytes_(num_bytes) {
    DEEPCOMM_CUDA_CHECK(device_->driver(),
                        cuMemAddressReserve(&begin_, static_cast<size_t>(num_bytes), 0, 0, 0));
}

AddressRange::~AddressRange() {
    DEEPCOMM_CUDA_LOG(device_->driver(), cuMemAddressFree(begin_, static_cast<size_t>(num_bytes_)));
}

Mapping::Mapping(std::shared_ptr<Device> device, std::shared_ptr<PhysicalMemory> memory)
    : memory_(std::move(memory)), range_(std::move(device), memory_->num_bytes()) {
    const Device& own = range_.device();
    DEEPCOMM_CUDA_CHECK(
        own.driver(),
        cuMemMap(range_.begin(), static_cast<size_t>(range_.num_bytes()), 0, memory_->handle(), 0));
    try {
        allow(own);
    } catch (const Error&) {
        unmap();
        throw;
    }
}

void Mapping::allow(const Device& device) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const cu::AccessDescription access{{cu::kOnDevice, device.index()}, cu::kReadWrite};
    DEEPCOMM_CUDA_CHECK(
        device.driver(),
        cuMemSetAccess(range_.begin(), static_cast<size_t>(range_.num_bytes()), &access, 1));
}

Mapping::~Mapping() { unmap(); }

void Mapping::unmap() noexcept {
    DEEPCOMM_CUDA_LOG(range_.device().driver(),
                      cuMemUnmap(range_.begin(), static_cast<size_t>(range_.num_bytes())));
}

}  // namespace deepcomm::host
