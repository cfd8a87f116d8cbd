// SPDX-License-Identifier: Apache-2.0
// A kernel in a device's context, fully loaded: launching it later waits for nothing.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "host/device.hpp"

namespace deepcomm::host {

/// What the compiler knows of a kernel.
struct KernelImage {
    std::string cubin;
    std::string symbol;
    int shared_bytes = 0;  ///< dynamic shared memory
    int max_threads = 0;   ///< of a block; 0: the device's limit
    /// Whether it calls device::await_kernel_ahead before it touches memory, and may be launched before the kernel
    /// ahead of it on its stream has ended (programmatic dependent launch).
    bool awaits_ahead = false;
};

/// Unloaded when symmetric memory is reserved next: host/put_off.hpp.
class Function {
  public:
    Function(std::shared_ptr<Device> device, const KernelImage& image);
    ~Function();
    Function(const Function&) = delete;
    Function& operator=(const Function&) = delete;

    int max_threads() const { return max_threads_; }
    /// Blocks of max_threads threads that are resident on one SM at the same time.
    int blocks_per_sm() const { return blocks_per_sm_; }

    /// For kernels that may count on so many SMs. If that is the whole device, launches that begin early spread over it:
    /// they are placed while the kernel ahead still has SMs, and others would get as many of their blocks as fit.
    void spread_over(int num_sms);

    /// Launches grid blocks of max_threads threads. The kernel's only argument, a struct of
    /// num_bytes bytes, is copied before this returns.
    void launch(int grid, const void* params, int64_t num_bytes, cu::Stream stream) const;

  private:
    void load(const KernelImage& image);
    /// Dynamic shared memory of a block: where launches spread, so much that no SM gets more than its share of them.
    int shared_bytes_of(int grid) const;

    std::shared_ptr<Device> device_;
    std::string symbol_;
    int shared_bytes_;
    bool is_early_ = false;     ///< launched as KernelImage.awaits_ahead says
    int spread_sms_ = 0;        ///< that launches spread over, 0 if they do not
    int sm_shared_bytes_ = 0;   ///< of an SM
    int own_shared_bytes_ = 0;  ///< that a block has beside dynamic ones
    cu::Module module_ = nullptr;
    cu::Function function_ = nullptr;
    int max_threads_ = 0;
    int blocks_per_sm_ = 0;
    int64_t params_bytes_ = -1;  ///< -1: this driver does not tell
};

}  // namespace deepcomm::host
