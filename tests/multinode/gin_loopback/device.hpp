// SPDX-License-Identifier: Apache-2.0
// Copies between registered host memory and a GPU, by the driver alone, from any thread. A process's
// have a context of their own: a program may keep the lock of its context while it waits, as long as
// a copy or the loading of a kernel lasts, for kernels that wait for the network. A lane is a stream
// with one event behind the copies that it was last given.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>

namespace loopback {

struct Driver;

class Device {
  public:
    /// The GPU that memory lives on. Throws std::runtime_error, as all below.
    explicit Device(const void* address);
    Device(const Device&) = delete;
    Device& operator=(const Device&) = delete;

    int ordinal() const { return ordinal_; }

    /// Makes the GPU's context the thread's while it lives.
    class Scope {
      public:
        explicit Scope(const Device& device);
        ~Scope();
        Scope(const Scope&) = delete;
        Scope& operator=(const Scope&) = delete;

      private:
        const Driver& driver_;
    };

  private:
    friend class Lane;
    friend class Pinned;
    const Driver& driver_;
    int ordinal_ = 0;
    std::shared_ptr<void> context_;
};

class Lane {
  public:
    explicit Lane(const Device& device);
    ~Lane();
    Lane(const Lane&) = delete;
    Lane& operator=(const Lane&) = delete;

    void copy(void* to, const void* from, size_t num_bytes);
    void mark();     ///< behind what was copied until now
    bool is_done();  ///< whether the copies before the mark have ended
    void wait();     ///< for all copies; short ones only, since the caller's thread waits

  private:
    const Driver& driver_;
    void* stream_ = nullptr;
    void* event_ = nullptr;
};

/// Host memory that the GPU's copy engines reach.
class Pinned {
  public:
    Pinned(const Device& device, void* address, size_t num_bytes);
    ~Pinned();
    Pinned(const Pinned&) = delete;
    Pinned& operator=(const Pinned&) = delete;

  private:
    const Driver& driver_;
    void* address_;
};

}  // namespace loopback
