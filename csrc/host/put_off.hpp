// SPDX-License-Identifier: Apache-2.0
// What kernels may still use, or what waits for them, when its last reference is dropped is freed later.
// They may wait for other ranks of this process, and these for the thread that happens to drop the
// reference, as a garbage collector does.
#pragma once

#include <functional>
#include <memory>

#include "host/device.hpp"

namespace deepcomm::host {

/// For destructors: free will be called with the device.
void put_off(std::shared_ptr<Device> device, std::function<void(const Device&)> free);

/// Frees what was put off, once the devices' work so far is done. By whoever reserves symmetric memory:
/// that is collective, and all that this rank had to launch for others has been launched.
void free_put_off();

}  // namespace deepcomm::host
