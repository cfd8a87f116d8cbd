// SPDX-License-Identifier: Apache-2.0
// The device layer's arithmetic over arrays of bit patterns, as a library for test_arithmetic.py; that of
// turns for test_low_latency_turns.py.
#include "device/device.cuh"
#include "layout/low_latency.hpp"

using namespace deepcomm::device;

extern "C" {

/// add, multiply, divide
void deepcomm_binary(int operation, int64_t count, const uint32_t* a, const uint32_t* b,
                     uint32_t* result) {
    for (int64_t i = 0; i < count; ++i) {
        const float x = float_from_bits(a[i]);
        const float y = float_from_bits(b[i]);
        const float value = operation == 0   ? fadd_rn(x, y)
                            : operation == 1 ? fmul_rn(x, y)
                                             : fdiv_rn(x, y);
        result[i] = float_bits(value);
    }
}

/// Both halves of the packed conversion, each from its own operand.
void deepcomm_bf16(int64_t count, const uint32_t* a, const uint32_t* b, uint32_t* packed) {
    for (int64_t i = 0; i < count; ++i) {
        packed[i] = bf16x2_from_floats(float_from_bits(a[i]), float_from_bits(b[i]));
    }
}

void deepcomm_bf16_halves(int64_t count, const uint32_t* packed, uint32_t* low, uint32_t* high) {
    for (int64_t i = 0; i < count; ++i) {
        low[i] = float_bits(bf16x2_low(packed[i]));
        high[i] = float_bits(bf16x2_high(packed[i]));
    }
}

/// One BF16 there and back.
void deepcomm_bf16_single(int64_t count, const uint16_t* bits, uint16_t* result) {
    for (int64_t i = 0; i < count; ++i) result[i] = bf16_from_float(float_from_bf16(bits[i]));
}

void deepcomm_max_halves(int64_t count, const uint32_t* a, const uint32_t* b, uint32_t* result) {
    for (int64_t i = 0; i < count; ++i) result[i] = max_u16x2(a[i], b[i]);
}

/// The FP8 cast of tiles of 128, one scale each.
void deepcomm_cast_tiles(bool ue8m0, int64_t count, const uint32_t* x, uint32_t* data,
                         uint32_t* scales) {
    constexpr int64_t kTile = deepcomm::kScaleTile;
    for (int64_t tile = 0; tile < count; ++tile, x += kTile, data += kTile / 4) {
        uint32_t amax_bits = kAmaxFloorBits;
        for (int64_t i = 0; i < kTile; ++i) {
            const uint32_t magnitude = magnitude_bits(float_from_bits(x[i]));
            amax_bits = magnitude > amax_bits ? magnitude : amax_bits;
        }
        const TileScale scale = ue8m0 ? ue8m0_tile_scale(amax_bits) : fp32_tile_scale(amax_bits);
        scales[tile] = scale.stored;
        for (int64_t i = 0; i < kTile; i += 4) {
            const auto at = [&](int64_t j) {
                return fmul_rn(float_from_bits(x[i + j]), scale.inverse);
            };
            data[i / 4] = e4m3x4_from_floats(at(0), at(1), at(2), at(3));
        }
    }
}

void deepcomm_e4m3(int64_t count, const uint32_t* a, const uint32_t* b, uint32_t* packed) {
    for (int64_t i = 0; i < count; ++i) {
        packed[i] = e4m3x2_from_floats(float_from_bits(a[i]), float_from_bits(b[i]));
    }
}

/// Turns of low-latency operations, by their numbers.
void deepcomm_turns(int num_slots, int64_t count, const uint64_t* numbers, uint32_t* tags,
                    int32_t* slots) {
    for (int64_t i = 0; i < count; ++i) {
        const auto turn = deepcomm::layout::turn_of(numbers[i], num_slots);
        tags[i] = turn.tag;
        slots[i] = turn.slot;
    }
}

/// Quotients and remainders by a Divisor.
void deepcomm_divide(int32_t number, int64_t count, const int32_t* values, int32_t* quotients,
                     int32_t* remainders) {
    const auto by = deepcomm::Divisor::of(number);
    for (int64_t i = 0; i < count; ++i) {
        quotients[i] = values[i] / by;
        remainders[i] = values[i] % by;
    }
}

}  // extern "C"
