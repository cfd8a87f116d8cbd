// SPDX-License-Identifier: Apache-2.0
// The device layer: the only header of device/ that kernels include. One set of names with two
// implementations, inline PTX under NVRTC and nvcc (cuda/) and the emulator on a host (emu/); what
// is written in terms of those names exists once.
//
// Order and scope are part of a name: ld_acquire_sys, st_release_gpu, red_add_relaxed_sys. Plain
// loads and stores are plain C++ and must be ordered by these.
#pragma once

#include "device/barrier.cuh"
#include "device/check.cuh"
#include "device/convert.cuh"
#include "device/epoch.cuh"
#include "device/group.cuh"
#include "device/primitives.cuh"
#include "device/wait.cuh"
