// SPDX-License-Identifier: Apache-2.0
// CUDA's driver library, opened at run time, and the one way to call it: failures become CudaError.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "common/error.hpp"
#include "host/cuda_api.hpp"

namespace deepcomm::host {

class Driver {
  public:
    /// Opens the library and initialises it. Throws CudaError with a remedy where there is none, or
    /// where it is too old. The library stays loaded: the driver does not survive being unloaded.
    static std::shared_ptr<Driver> open(const std::string& path);
    Driver(const Driver&) = delete;
    Driver& operator=(const Driver&) = delete;

    const cu::Api& api() const { return api_; }
    /// 1000 * major + 10 * minor of the newest CUDA it supports.
    int version() const;
    int num_devices() const;
    int attribute(int device, int attribute) const;
    std::string device_name(int device) const;
    /// 32 hexadecimal digits: the same device in every process.
    std::string device_uuid(int device) const;
    bool can_access_peer(int device, int peer) const;
    /// Whether the context that torch uses exists already.
    bool has_context(int device) const;

    /// Throws CudaError unless code is success; call is the source text, detail what it was for.
    void check(cu::Result code, const char* call, const std::string& detail = "") const;
    /// For destructors: prints a failure to the standard error stream instead. Returns whether the
    /// call succeeded.
    bool log(cu::Result code, const char* call) const noexcept;

  private:
    explicit Driver(const std::string& path);
    std::string describe(cu::Result code, const char* call) const;

    cu::Api api_;
};

}  // namespace deepcomm::host

/// Calls a function of the driver; throws CudaError with the call's text, the code and its name.
#define DEEPCOMM_CUDA_CHECK(driver, call) (driver).check((driver).api().call, #call)
/// The same in a destructor: prints and goes on.
#define DEEPCOMM_CUDA_LOG(driver, call) (driver).log((driver).api().call, #call)
