// SPDX-License-Identifier: Apache-2.0
// What waits for kernels when it is freed is put off. They may wait for other ranks of this process,
// and these for the thread that happens to drop the last reference, as a garbage collector does.
#pragma once

#include <functional>

namespace deepcomm::host {

/// For destructors.
void put_off(std::function<void()> free);

/// Frees what was put off. By whoever reserves symmetric memory: that is collective, and all that this
/// rank had to launch for others has been launched.
void free_put_off();

}  // namespace deepcomm::host
