// SPDX-License-Identifier: Apache-2.0
// Owners of memory that one rank uses alone: of the device, and of the host for both to see. Both
// are zeroed. They are freed when symmetric memory is reserved next: host/put_off.hpp.
#pragma once

#include <cstdint>
#include <memory>

#include "host/device.hpp"

namespace deepcomm::host {

class DeviceMemory {
  public:
    DeviceMemory(std::shared_ptr<Device> device, int64_t num_bytes);
    ~DeviceMemory();
    DeviceMemory(const DeviceMemory&) = delete;
    DeviceMemory& operator=(const DeviceMemory&) = delete;

    cu::DevicePtr address() const { return address_; }
    int64_t num_bytes() const { return num_bytes_; }
    void copy_from_host(const void* from, int64_t num_bytes);

  private:
    static void free(const Device& device, cu::DevicePtr address) noexcept;

    std::shared_ptr<Device> device_;
    int64_t num_bytes_;
    cu::DevicePtr address_ = 0;
};

class HostMemory {
  public:
    HostMemory(std::shared_ptr<Device> device, int64_t num_bytes);
    ~HostMemory();
    HostMemory(const HostMemory&) = delete;
    HostMemory& operator=(const HostMemory&) = delete;

    void* address() const { return address_; }
    cu::DevicePtr device_address() const { return device_address_; }
    int64_t num_bytes() const { return num_bytes_; }

  private:
    static void free(const Device& device, void* address) noexcept;

    std::shared_ptr<Device> device_;
    int64_t num_bytes_;
    void* address_ = nullptr;
    cu::DevicePtr device_address_ = 0;
};

}  // namespace deepcomm::host
