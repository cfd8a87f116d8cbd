// SPDX-License-Identifier: Apache-2.0
// What kernels need to use NCCL's device API: a device communicator and windows of registered memory.
// NCCL's structs come and go as bytes, of sizes that the compiled kernel knows. What is left when the
// communicator ends, ends with it.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "host/communicator.hpp"

namespace deepcomm::host {

class DeviceCommunicator {
  public:
    /// Throws NcclError where the library is too old.
    explicit DeviceCommunicator(std::shared_ptr<Communicator> communicator);

    /// Fills in the communicator's properties.
    std::string query(std::string properties, const Patience& patience) const;
    /// Returns the bytes that kernels get; collective. Once.
    std::string create(const std::string& requirements, int64_t num_bytes,
                       const Patience& patience);
    /// Returns a window's handle; collective, with as many bytes on all ranks. Throws NcclError where
    /// the memory is not of the kind that NCCL can register.
    uintptr_t register_window(uintptr_t address, int64_t num_bytes, const Patience& patience);
    /// No rank may use the window any more.
    void deregister_window(uintptr_t window, const Patience& patience);
    /// Gives everything back; collective, for kernels of all ranks must be done. The communicator can be
    /// closed then. Idempotent.
    void close(const Patience& patience);

  private:
    void call(const char* name, const Patience& patience,
              const std::function<nccl::Result(nccl::Comm)>& function) const {
        communicator_->call(name, patience, function);
    }

    std::shared_ptr<Communicator> communicator_;
    const nccl::Api& api_;
    /// NCCL writes to these from a thread of its own, maybe after a deadline: they stay where they are.
    std::string dev_comm_;
    std::map<uint64_t, nccl::Window> windows_;
    uint64_t num_windows_ = 0;
    bool is_created_ = false;
};

}  // namespace deepcomm::host
