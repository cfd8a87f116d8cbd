// SPDX-License-Identifier: Apache-2.0
// The vocabulary of the emulator: scopes and orders, and what a fiber sees as threadIdx etc.
#pragma once

#include <cstdint>

struct uint3 {
    unsigned int x, y, z;
};

struct dim3 {
    unsigned int x = 1, y = 1, z = 1;
};

namespace deepcomm::emu {

enum class Scope : uint8_t { kBlock, kGpu, kSys };
constexpr int kNumScopes = 3;

enum class Order : uint8_t { kRelaxed, kAcquire, kRelease, kAcqRel };

/// Identity of the running thread; constant for a fiber.
struct ThreadIdentity {
    uint3 thread_idx{};
    uint3 block_idx{};
    dim3 block_dim{};
    dim3 grid_dim{};
};

}  // namespace deepcomm::emu
