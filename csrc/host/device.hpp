// SPDX-License-Identifier: Apache-2.0
// One GPU of this process: its primary context (the one that torch uses), what it can do, and a
// stream of our own for setting up memory, so that doing so waits for no kernel of others.
#pragma once

#include <cstdint>
#include <memory>
#include <new>
#include <string>

#include "host/driver.hpp"

namespace deepcomm::host {

class Device {
  public:
    static std::shared_ptr<Device> open(std::shared_ptr<Driver> driver, int index);
    ~Device();
    Device(const Device&) = delete;
    Device& operator=(const Device&) = delete;

    const Driver& driver() const { return *driver_; }
    int index() const { return index_; }
    /// "cuda:0 (NVIDIA H200)".
    std::string label() const;
    int attribute(int attribute) const { return driver_->attribute(index_, attribute); }
    /// 10 * major + minor.
    int capability() const;
    /// The ways in which other processes can get its memory: cu::kPosixFd and cu::kFabric, where the
    /// attribute says so and, for the latter, a trial allocation succeeds.
    int handle_types() const { return handle_types_; }
    /// Properties of every allocation of symmetric memory.
    cu::AllocationProperties properties(int handle_types) const;

    /// Blocking, on the stream for setting up.
    void zero(cu::DevicePtr address, int64_t num_bytes) const;
    void copy_from_host(cu::DevicePtr to, const void* from, int64_t num_bytes) const;
    cu::Stream setup_stream() const { return setup_stream_; }

    /// A non-blocking stream that is never destroyed: torch's allocator may record events on it at
    /// any time. The lower the priority, the more urgent.
    cu::Stream make_stream(int priority) const;

    /// Makes the context current in this thread for a while, unless it is that: asking is faster than
    /// pushing and popping. For destructors: without throwing.
    class Current {
      public:
        explicit Current(const Device& device);
        Current(const Device& device, std::nothrow_t) noexcept;
        ~Current();
        Current(const Current&) = delete;
        Current& operator=(const Current&) = delete;

      private:
        const Driver& driver_;
        bool is_pushed_ = true;
    };

  private:
    Device(std::shared_ptr<Driver> driver, int index);
    void find_handle_types();

    std::shared_ptr<Driver> driver_;
    int index_;
    cu::Context context_ = nullptr;
    cu::Stream setup_stream_ = nullptr;
    int handle_types_ = 0;
    bool has_rdma_ = false;
};

}  // namespace deepcomm::host
