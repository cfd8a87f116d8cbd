// SPDX-License-Identifier: Apache-2.0
#include "common/env.hpp"

#include <cstdlib>

namespace deepcomm {

std::string env_cpu_isa() {
    const char* value = std::getenv("DEEPCOMM_CPU_ISA");
    return value == nullptr ? std::string() : std::string(value);
}

}  // namespace deepcomm
