// SPDX-License-Identifier: Apache-2.0
// Chooses the instruction set at run time.
#include "cpu/simd/simd.hpp"

#include <initializer_list>

#include "cpu/simd/tables.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#else
#include <atomic>
#endif

namespace deepcomm::cpu {

void stream_fence() {
#if defined(__x86_64__)
    // ORDER: non-temporal stores pass later stores; this pairs with the acquire of whoever reads the
    // row after seeing what the caller publishes next.
    _mm_sfence();
#else
    std::atomic_thread_fence(std::memory_order_release);
#endif
}

bool isa_supported(Isa isa) {
#if DEEPCOMM_SIMD_X86
    // The compiler's check covers the operating system's saving of the registers, too.
    if (isa == Isa::kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
    if (isa == Isa::kAvx512) {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    }
#endif
    return isa == Isa::kPortable;
}

Isa best_isa() {
    for (const Isa isa : {Isa::kAvx512, Isa::kAvx2}) {
        if (isa_supported(isa)) return isa;
    }
    return Isa::kPortable;
}

const RowOps& row_ops(Isa isa) {
#if DEEPCOMM_SIMD_X86
    if (isa == Isa::kAvx2) return avx2_row_ops();
    if (isa == Isa::kAvx512) return avx512_row_ops();
#endif
    static_cast<void>(isa);
    return portable_row_ops();
}

std::string isa_name(Isa isa) {
    switch (isa) {
        case Isa::kAvx512: return "avx512";
        case Isa::kAvx2: return "avx2";
        case Isa::kPortable: return "portable";
    }
    return "unknown";
}

}  // namespace deepcomm::cpu
