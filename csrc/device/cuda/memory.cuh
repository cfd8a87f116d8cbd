// SPDX-License-Identifier: Apache-2.0
// Loads, stores and atomics with order and scope in their names, and fences. gpu and sys scope act
// on global memory, block scope on shared memory: by generic addresses, atomics there take long. One
// instruction a function.
#pragma once

#include "device/cuda/platform.cuh"

namespace deepcomm::device {

// What an instruction that names its state space takes for an address.
#define DEEPCOMM_IN_GLOBAL(address) address
#define DEEPCOMM_IN_SHARED(address) __cvta_generic_to_shared(address)

// ORDER: an acquire load pairs with a release store, red or atomic of a scope that reaches it; the
// "memory" clobber keeps the compiler from moving plain accesses across.
#define DEEPCOMM_DEFINE_LOAD(name, order, type, constraint, suffix, place) \
    DEEPCOMM_DEVICE type name(const type* address) {                       \
        type value;                                                        \
        asm volatile("ld." order suffix " %0, [%1];"                       \
                     : "=" constraint(value)                               \
                     : "l"(place(address))                                 \
                     : "memory");                                          \
        return value;                                                      \
    }

#define DEEPCOMM_DEFINE_STORE(name, order, type, constraint, suffix, place)                   \
    DEEPCOMM_DEVICE void name(type* address, type value) {                                    \
        asm volatile("st." order suffix " [%0], %1;" ::"l"(place(address)), constraint(value) \
                     : "memory");                                                             \
    }

#define DEEPCOMM_DEFINE_RED(name, order, type, constraint, suffix, place)                      \
    DEEPCOMM_DEVICE void name(type* address, type value) {                                     \
        asm volatile("red." order suffix " [%0], %1;" ::"l"(place(address)), constraint(value) \
                     : "memory");                                                              \
    }

#define DEEPCOMM_DEFINE_ATOM(name, order, type, constraint, suffix, place) \
    DEEPCOMM_DEVICE type name(type* address, type value) {                 \
        type before;                                                       \
        asm volatile("atom." order suffix " %0, [%1], %2;"                 \
                     : "=" constraint(before)                              \
                     : "l"(place(address)), constraint(value)              \
                     : "memory");                                          \
        return before;                                                     \
    }

#define DEEPCOMM_DEFINE_CAS(name, order, type, constraint, suffix, place)             \
    DEEPCOMM_DEVICE type name(type* address, type expected, type desired) {           \
        type before;                                                                  \
        asm volatile("atom." order suffix " %0, [%1], %2, %3;"                        \
                     : "=" constraint(before)                                         \
                     : "l"(place(address)), constraint(expected), constraint(desired) \
                     : "memory");                                                     \
        return before;                                                                \
    }

#define DEEPCOMM_DEFINE_SCOPE(scope, ptx, type, constraint, bits, place)                          \
    DEEPCOMM_DEFINE_LOAD(ld_relaxed_##scope, "relaxed." ptx, type, constraint, ".u" bits, place)  \
    DEEPCOMM_DEFINE_LOAD(ld_acquire_##scope, "acquire." ptx, type, constraint, ".u" bits, place)  \
    DEEPCOMM_DEFINE_STORE(st_relaxed_##scope, "relaxed." ptx, type, constraint, ".u" bits, place) \
    DEEPCOMM_DEFINE_STORE(st_release_##scope, "release." ptx, type, constraint, ".u" bits, place) \
    DEEPCOMM_DEFINE_RED(red_add_relaxed_##scope, "relaxed." ptx ".add", type, constraint,         \
                        ".u" bits, place)                                                         \
    DEEPCOMM_DEFINE_RED(red_add_release_##scope, "release." ptx ".add", type, constraint,         \
                        ".u" bits, place)                                                         \
    DEEPCOMM_DEFINE_ATOM(atom_add_relaxed_##scope, "relaxed." ptx ".add", type, constraint,       \
                         ".u" bits, place)                                                        \
    DEEPCOMM_DEFINE_ATOM(atom_add_acquire_##scope, "acquire." ptx ".add", type, constraint,       \
                         ".u" bits, place)                                                        \
    DEEPCOMM_DEFINE_ATOM(atom_add_release_##scope, "release." ptx ".add", type, constraint,       \
                         ".u" bits, place)                                                        \
    DEEPCOMM_DEFINE_ATOM(atom_add_acq_rel_##scope, "acq_rel." ptx ".add", type, constraint,       \
                         ".u" bits, place)                                                        \
    DEEPCOMM_DEFINE_ATOM(atom_or_relaxed_##scope, "relaxed." ptx ".or", type, constraint,         \
                         ".b" bits, place)                                                        \
    DEEPCOMM_DEFINE_ATOM(atom_exchange_acq_rel_##scope, "acq_rel." ptx ".exch", type, constraint, \
                         ".b" bits, place)                                                        \
    DEEPCOMM_DEFINE_CAS(atom_cas_relaxed_##scope, "relaxed." ptx ".cas", type, constraint,        \
                        ".b" bits, place)                                                         \
    DEEPCOMM_DEFINE_CAS(atom_cas_acq_rel_##scope, "acq_rel." ptx ".cas", type, constraint,        \
                        ".b" bits, place)

#define DEEPCOMM_DEFINE_TYPE(type, constraint, bits)                                       \
    DEEPCOMM_DEFINE_SCOPE(block, "cta.shared", type, constraint, bits, DEEPCOMM_IN_SHARED) \
    DEEPCOMM_DEFINE_SCOPE(gpu, "gpu.global", type, constraint, bits, DEEPCOMM_IN_GLOBAL)   \
    DEEPCOMM_DEFINE_SCOPE(sys, "sys.global", type, constraint, bits, DEEPCOMM_IN_GLOBAL)

DEEPCOMM_DEFINE_TYPE(uint32_t, "r", "32")
DEEPCOMM_DEFINE_TYPE(uint64_t, "l", "64")

#undef DEEPCOMM_DEFINE_TYPE
#undef DEEPCOMM_DEFINE_SCOPE
#undef DEEPCOMM_DEFINE_CAS
#undef DEEPCOMM_DEFINE_ATOM
#undef DEEPCOMM_DEFINE_RED
#undef DEEPCOMM_DEFINE_STORE
#undef DEEPCOMM_DEFINE_LOAD
#undef DEEPCOMM_IN_SHARED
#undef DEEPCOMM_IN_GLOBAL

// ---- strong vectors: 16 bytes in one single-copy atomic access, for flags that travel with data

/// ORDER: relaxed, so it orders nothing else; only the 16 bytes themselves arrive together.
DEEPCOMM_DEVICE Vec128 ld_relaxed_sys(const Vec128* address) {
    uint64_t low, high;
    asm volatile(
        "{.reg .b128 value;\n"
        " ld.relaxed.sys.global.b128 value, [%2];\n"
        " mov.b128 {%0, %1}, value;}"
        : "=l"(low), "=l"(high)
        : "l"(address)
        : "memory");
    return {{static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32),
             static_cast<uint32_t>(high), static_cast<uint32_t>(high >> 32)}};
}

/// ORDER: as above.
DEEPCOMM_DEVICE void st_relaxed_sys(Vec128* address, const Vec128& value) {
    const uint64_t low = value.words[0] | static_cast<uint64_t>(value.words[1]) << 32;
    const uint64_t high = value.words[2] | static_cast<uint64_t>(value.words[3]) << 32;
    asm volatile(
        "{.reg .b128 value;\n"
        " mov.b128 value, {%1, %2};\n"
        " st.relaxed.sys.global.b128 [%0], value;}" ::"l"(address),
        "l"(low), "l"(high)
        : "memory");
}

// ---- plain vectors that pass the L1 cache by: rows are touched once

DEEPCOMM_DEVICE Vec128 ld_weak_streaming(const Vec128* address) {
    Vec128 value;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.words[0]), "=r"(value.words[1]), "=r"(value.words[2]),
                   "=r"(value.words[3])
                 : "l"(address)
                 : "memory");
    return value;
}

DEEPCOMM_DEVICE void st_weak_streaming(Vec128* address, const Vec128& value) {
    asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address),
                 "r"(value.words[0]), "r"(value.words[1]), "r"(value.words[2]), "r"(value.words[3])
                 : "memory");
}

// ---- fences

// ORDER: fence.acq_rel between a plain access and a relaxed strong one makes that a release, and
// the other way round an acquire. fence.sc also puts all fence.sc of the scope in one order, which
// is what store-then-load of two locations needs.
DEEPCOMM_DEVICE void fence_acq_rel_block() { asm volatile("fence.acq_rel.cta;" ::: "memory"); }
DEEPCOMM_DEVICE void fence_acq_rel_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
DEEPCOMM_DEVICE void fence_acq_rel_sys() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }
DEEPCOMM_DEVICE void fence_sc_gpu() { asm volatile("fence.sc.gpu;" ::: "memory"); }
DEEPCOMM_DEVICE void fence_sc_sys() { asm volatile("fence.sc.sys;" ::: "memory"); }

}  // namespace deepcomm::device
