// SPDX-License-Identifier: Apache-2.0
// All probes in one unit, for the JIT and the emulator.
#pragma once

#include "kernels/probe/barrier_fold.cuh"
#include "kernels/probe/bulk_copy.cuh"
#include "kernels/probe/bulk_put.cuh"
#include "kernels/probe/claim.cuh"
#include "kernels/probe/packet.cuh"
#include "kernels/probe/ring.cuh"
#include "kernels/probe/signal.cuh"
