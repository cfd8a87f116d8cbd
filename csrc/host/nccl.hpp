// SPDX-License-Identifier: Apache-2.0
// NCCL's library, opened at run time, and the one way to call it: failures become NcclError, those
// of peers CommError. A process must not have two of them, so the one that torch has loaded is taken.
#pragma once

#include <memory>
#include <string>

#include "common/error.hpp"
#include "host/nccl_api.hpp"

namespace deepcomm::host {

class Nccl {
  public:
    /// Takes the library that is loaded already; else the one at path, if that is not empty; else
    /// the loader's. Throws NcclError with a remedy where there is none, or where it is too old. The
    /// library stays loaded.
    static std::shared_ptr<Nccl> find(const std::string& path);
    /// Takes the one at path, whatever is loaded.
    static std::shared_ptr<Nccl> open(const std::string& path);
    Nccl(const Nccl&) = delete;
    Nccl& operator=(const Nccl&) = delete;

    const nccl::Api& api() const { return api_; }
    /// The file that its code is in.
    const std::string& path() const { return path_; }
    int version() const { return version_; }
    /// Whether it had been loaded before it was asked for: by torch, normally.
    bool was_loaded() const { return was_loaded_; }
    /// What ranks of one communicator share. The library waits for them, in a thread of its own.
    nccl::UniqueId make_unique_id() const;

    /// Throws if code is a failure; call is the source text.
    void check(nccl::Result code, const std::string& call) const;
    /// For destructors: prints a failure to the standard error stream instead.
    void log(nccl::Result code, const char* call) const noexcept;

  private:
    Nccl(void* library, const std::string& name, bool was_loaded);
    std::string describe(nccl::Result code, const std::string& call) const;

    nccl::Api api_;
    std::string path_;
    int version_ = 0;
    bool was_loaded_;
};

/// "2.28.9".
std::string nccl_version_text(int version);

}  // namespace deepcomm::host

/// Calls a function of NCCL; throws with the call's text, the code, its name and NCCL's own message.
#define DEEPCOMM_NCCL_CHECK(nccl, call) (nccl).check((nccl).api().call, #call)
/// The same in a destructor: prints and goes on.
#define DEEPCOMM_NCCL_LOG(nccl, call) (nccl).log((nccl).api().call, #call)
