// SPDX-License-Identifier: Apache-2.0
// The rail agent with what the host has to know of its NCCL.
#pragma once

#include "kernels/gin/agent.cuh"
#include "kernels/gin/facts.cuh"
