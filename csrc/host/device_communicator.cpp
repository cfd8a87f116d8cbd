// SPDX-License-Identifier: Apache-2.0
#include "host/device_communicator.hpp"

#include <utility>

namespace deepcomm::host {

DeviceCommunicator::DeviceCommunicator(std::shared_ptr<Communicator> communicator)
    : communicator_(std::move(communicator)), api_(communicator_->nccl().api()) {
    const int version = communicator_->nccl().version();
    const bool has_all = api_.ncclCommWindowRegister != nullptr &&
                         api_.ncclCommWindowDeregister != nullptr &&
                         api_.ncclCommQueryProperties != nullptr &&
                         api_.ncclDevCommCreate != nullptr && api_.ncclDevCommDestroy != nullptr;
    if (version < nccl::kDeviceApiVersion || !has_all) {
        throw NcclError(format("%s: expected NCCL %s or newer for its device API, got %s%s",
                               communicator_->nccl().path().c_str(),
                               nccl_version_text(nccl::kDeviceApiVersion).c_str(),
                               nccl_version_text(version).c_str(),
                               has_all ? "" : ", without functions of it"));
    }
}

std::string DeviceCommunicator::query(std::string properties, const Patience& patience) const {
    call("ncclCommQueryProperties()", patience,
         [&](nccl::Comm comm) { return api_.ncclCommQueryProperties(comm, properties.data()); });
    return properties;
}

std::string DeviceCommunicator::create(const std::string& requirements, int64_t num_bytes,
                                       const Patience& patience) {
    DEEPCOMM_ASSERT(dev_comm_.empty(), "a second device communicator of one communicator");
    dev_comm_.assign(static_cast<size_t>(num_bytes), '\0');
    call("ncclDevCommCreate()", patience, [&](nccl::Comm comm) {
        return api_.ncclDevCommCreate(comm, requirements.data(), dev_comm_.data());
    });
    is_created_ = true;
    return dev_comm_;
}

uintptr_t DeviceCommunicator::register_window(uintptr_t address, int64_t num_bytes,
                                              const Patience& patience) {
    const uint64_t key = num_windows_++;
    nccl::Window& window = windows_[key];
    call("ncclCommWindowRegister()", patience, [&](nccl::Comm comm) {
        return api_.ncclCommWindowRegister(comm, reinterpret_cast<void*>(address),
                                           static_cast<size_t>(num_bytes), &window,
                                           nccl::kSymmetricWindow);
    });
    if (window == nullptr) {
        windows_.erase(key);
        throw NcclError(
            "ncclCommWindowRegister(): expected a window, got none: NCCL has no "
            "symmetric memory here (NCCL_CUMEM_ENABLE, NCCL_DEBUG=INFO says more)");
    }
    return reinterpret_cast<uintptr_t>(window);
}

void DeviceCommunicator::deregister_window(uintptr_t window, const Patience& patience) {
    for (auto entry = windows_.begin(); entry != windows_.end(); ++entry) {
        if (reinterpret_cast<uintptr_t>(entry->second) != window) continue;
        const nccl::Window handle = entry->second;
        windows_.erase(entry);
        call("ncclCommWindowDeregister()", patience,
             [&](nccl::Comm comm) { return api_.ncclCommWindowDeregister(comm, handle); });
        return;
    }
    throw InternalError("deregister_window: expected a registered window, got another address");
}

void DeviceCommunicator::close(const Patience& patience) {
    if (std::exchange(is_created_, false)) {
        call("ncclDevCommDestroy()", patience,
             [&](nccl::Comm comm) { return api_.ncclDevCommDestroy(comm, dev_comm_.data()); });
    }
    while (!windows_.empty()) {
        deregister_window(reinterpret_cast<uintptr_t>(windows_.begin()->second), patience);
    }
}

}  // namespace deepcomm::host
