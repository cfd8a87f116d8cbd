// SPDX-License-Identifier: Apache-2.0
// The only reader of environment variables in C++. Each variable is listed in README.md.
#pragma once

#include <string>

namespace deepcomm {

/// DEEPCOMM_CPU_ISA: instruction set of the CPU backend ("portable", "avx2", "avx512"); empty: best.
std::string env_cpu_isa();

}  // namespace deepcomm
