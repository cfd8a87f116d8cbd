// SPDX-License-Identifier: Apache-2.0
#include "host/device.hpp"

namespace deepcomm::host {

std::shared_ptr<Device> Device::open(std::shared_ptr<Driver> driver, int index) {
    const int count = driver->num_devices();
    DEEPCOMM_CHECK_ARG(index >= 0 && index < count,
                       "device: expected one of %d CUDA devices, got %d", count, index);
    if (driver->attribute(index, cu::kVirtualMemorySupported) == 0) {
        throw CudaError(
            format("cuda:%d (%s): expected a device with virtual memory management, got "
                   "one without",
                   index, driver->device_name(index).c_str()));
    }
    // In two steps, so that the destructor undoes what the second one did not finish.
    std::shared_ptr<Device> device(new Device(std::move(driver), index));
    const Current current(*device);
    device->setup_stream_ = device->make_stream(0);
    device->find_handle_types();
    return device;
}

Device::Device(std::shared_ptr<Driver> driver, int index)
    : driver_(std::move(driver)), index_(index) {
    DEEPCOMM_CUDA_CHECK(*driver_, cuDevicePrimaryCtxRetain(&context_, index_));
}

Device::~Device() {
    if (setup_stream_ != nullptr) {
        DEEPCOMM_CUDA_LOG(*driver_, cuStreamDestroy(setup_stream_));
    }
    DEEPCOMM_CUDA_LOG(*driver_, cuDevicePrimaryCtxRelease(index_));
}

std::string Device::label() const {
    return format("cuda:%d (%s)", index_, driver_->device_name(index_).c_str());
}

int Device::capability() const {
    return 10 * attribute(cu::kCapabilityMajor) + attribute(cu::kCapabilityMinor);
}

void Device::find_handle_types() {
    has_rdma_ = attribute(cu::kRdmaWithVirtualMemorySupported) != 0;
    handle_types_ = attribute(cu::kPosixFdSupported) != 0 ? cu::kPosixFd : 0;
    if (attribute(cu::kFabricSupported) == 0) {
        return;
    }
    // NOTE: the attribute is about the device; whether this process may use the fabric shows here.
    const auto trial = properties(handle_types_ | cu::kFabric);
    const cu::Api& api = driver_->api();
    size_t granularity = 0;
    cu::AllocationHandle handle = 0;
    cu::FabricHandle fabric{};
    if (api.cuMemGetAllocationGranularity(&granularity, &trial, cu::kMinimumGranularity) !=
            cu::kSuccess ||
        api.cuMemCreate(&handle, granularity, &trial, 0) != cu::kSuccess) {
        return;
    }
    if (api.cuMemExportToShareableHandle(&fabric, handle, cu::kFabric, 0) == cu::kSuccess) {
        handle_types_ |= cu::kFabric;
    }
    DEEPCOMM_CUDA_LOG(*driver_, cuMemRelease(handle));
}

cu::AllocationProperties Device::properties(int handle_types) const {
    cu::AllocationProperties properties{};
    properties.type = cu::kPinned;
    properties.handle_types = handle_types;
    properties.location = {cu::kOnDevice, index_};
    properties.flags.gpu_direct_rdma_capable = has_rdma_ ? 1 : 0;
    return properties;
}

void Device::zero(cu::DevicePtr address, int64_t num_bytes) const {
    const Current current(*this);
    DEEPCOMM_CUDA_CHECK(*driver_,
                        cuMemsetD8Async(address, 0, static_cast<size_t>(num_bytes), setup_stream_));
    DEEPCOMM_CUDA_CHECK(*driver_, cuStreamSynchronize(setup_stream_));
}

void Device::copy_from_host(cu::DevicePtr to, const void* from, int64_t num_bytes) const {
    const Current current(*this);
    DEEPCOMM_CUDA_CHECK(*driver_,
                        cuMemcpyHtoDAsync(to, from, static_cast<size_t>(num_bytes), setup_stream_));
    DEEPCOMM_CUDA_CHECK(*driver_, cuStreamSynchronize(setup_stream_));
}

cu::Stream Device::make_stream(int priority) const {
    const Current current(*this);
    cu::Stream stream = nullptr;
    DEEPCOMM_CUDA_CHECK(*driver_, cuStreamCreateWithPriority(&stream, cu::kNonBlocking, priority));
    return stream;
}

Device::Current::Current(const Device& device) : driver_(device.driver()) {
    cu::Context context = nullptr;
    DEEPCOMM_CUDA_CHECK(driver_, cuCtxGetCurrent(&context));
    is_pushed_ = context != device.context_;
    if (is_pushed_) {
        DEEPCOMM_CUDA_CHECK(driver_, cuCtxPushCurrent(device.context_));
    }
}

Device::Current::Current(const Device& device, std::nothrow_t) noexcept
    : driver_(device.driver()),
      is_pushed_(DEEPCOMM_CUDA_LOG(driver_, cuCtxPushCurrent(device.context_))) {}

Device::Current::~Current() {
    if (is_pushed_) {
        cu::Context context = nullptr;
        DEEPCOMM_CUDA_LOG(driver_, cuCtxPopCurrent(&context));
    }
}

}  // namespace deepcomm::host
