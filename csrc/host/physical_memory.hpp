// SPDX-License-Identifier: Apache-2.0
// Memory of a device apart from its address: what ranks hand to each other, and where one rank maps
// it.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

#include "host/device.hpp"

namespace deepcomm::host {

/// One allocation, made here or by another process. Lives as long as anyone in any process holds or
/// maps it.
class PhysicalMemory {
  public:
    /// Rounds num_bytes up to what the device allocates by.
    static std::shared_ptr<PhysicalMemory> create(std::shared_ptr<Device> device,
                                                  int64_t num_bytes);
    /// Takes another process's memory; the descriptor stays the caller's.
    static std::shared_ptr<PhysicalMemory> import_fd(std::shared_ptr<Device> device, int fd,
                                                     int64_t num_bytes);
    static std::shared_ptr<PhysicalMemory> import_fabric(std::shared_ptr<Device> device,
                                                         const std::string& fabric,
                                                         int64_t num_bytes);
    ~PhysicalMemory();
    PhysicalMemory(const PhysicalMemory&) = delete;
    PhysicalMemory& operator=(const PhysicalMemory&) = delete;

    /// A descriptor that the caller closes.
    int export_fd() const;
    /// 64 bytes that other hosts of the fabric can import.
    std::string export_fabric() const;

    cu::AllocationHandle handle() const { return handle_; }
    int64_t num_bytes() const { return num_bytes_; }

  private:
    PhysicalMemory(std::shared_ptr<Device> device, cu::AllocationHandle handle, int64_t num_bytes)
        : device_(std::move(device)), handle_(handle), num_bytes_(num_bytes) {}

    std::shared_ptr<Device> device_;
    cu::AllocationHandle handle_;
    int64_t num_bytes_;
};

/// A range of addresses.
class AddressRange {
  public:
    AddressRange(std::shared_ptr<Device> device, int64_t num_bytes);
    ~AddressRange();
    AddressRange(const AddressRange&) = delete;
    AddressRange& operator=(const AddressRange&) = delete;

    const Device& device() const { return *device_; }
    cu::DevicePtr begin() const { return begin_; }
    int64_t num_bytes() const { return num_bytes_; }

  private:
    std::shared_ptr<Device> device_;
    int64_t num_bytes_;
    cu::DevicePtr begin_ = 0;
};

/// Memory at addresses of its own. All ranks of a process use the same ones: kernels of one device
/// that reach the same memory at two addresses would have to order their accesses by a proxy fence.
class Mapping {
  public:
    /// Lets the device read and write.
    Mapping(std::shared_ptr<Device> device, std::shared_ptr<PhysicalMemory> memory);
    /// The kernels that use the memory must be done.
    ~Mapping();
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;

    /// Lets another device of this process read and write, too.
    void allow(const Device& device);
    cu::DevicePtr address() const { return range_.begin(); }

  private:
    void unmap() noexcept;

    std::shared_ptr<PhysicalMemory> memory_;
    AddressRange range_;
    std::mutex mutex_;
};

}  // namespace deepcomm::host
