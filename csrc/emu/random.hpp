// SPDX-License-Identifier: Apache-2.0
// The emulator's only source of choice: splitmix64, so that a seed is a whole schedule and no seed
// has a bad state.
#pragma once

#include <cstdint>

namespace deepcomm::emu {

class Random {
  public:
    explicit Random(uint64_t seed = 0) : state_(seed * 0x9E3779B97F4A7C15ull + 1) {}

    uint64_t next() {
        uint64_t z = (state_ += 0x9E3779B97F4A7C15ull);
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
        return z ^ (z >> 31);
    }

    /// Uniform in [0, bound); bound > 0.
    uint32_t below(uint32_t bound) {
        return static_cast<uint32_t>(((next() >> 32) * static_cast<uint64_t>(bound)) >> 32);
    }

    bool one_in(uint32_t bound) { return below(bound) == 0; }

  private:
    uint64_t state_;
};

}  // namespace deepcomm::emu
