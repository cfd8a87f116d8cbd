// SPDX-License-Identifier: Apache-2.0
// One function per source file of this folder; module.cpp calls them all.
#pragma once

#include <pybind11/pybind11.h>

namespace deepcomm {

void bind_cpu(pybind11::module_& module);
void bind_kernels(pybind11::module_& module);
void bind_kernels_low_latency(pybind11::module_& module);
void bind_low_latency_calls(pybind11::module_& module);
void bind_allocators(pybind11::module_& module);
void bind_cuda(pybind11::module_& module);
void bind_nccl(pybind11::module_& module);
void bind_simd(pybind11::module_& module);
void bind_slots(pybind11::module_& module);

}  // namespace deepcomm
