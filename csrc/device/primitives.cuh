// SPDX-License-Identifier: Apache-2.0
// The one place that chooses between the two implementations of the primitives.
#pragma once

#if defined(__CUDACC__)
#include "device/cuda/arithmetic.cuh"
#include "device/cuda/bulk.cuh"
#include "device/cuda/collective.cuh"
#include "device/cuda/memory.cuh"
#include "device/cuda/platform.cuh"
#include "device/cuda/rail.cuh"
#else
#include "device/emu/arithmetic.cuh"
#include "device/emu/bulk.cuh"
#include "device/emu/collective.cuh"
#include "device/emu/memory.cuh"
#include "device/emu/platform.cuh"
#include "device/emu/rail.cuh"
#endif
