// SPDX-License-Identifier: Apache-2.0
// Emulated counterpart of cuda/memory.cuh.
#pragma once

#include "device/emu/platform.cuh"

namespace deepcomm::device {

namespace emulated {

using emu::Order;
using emu::Scope;

template <typename T>
inline T load(const T* address, Order order, Scope scope) {
    T value;
    emu::strong_load(&value, address, sizeof(T), order, scope);
    return value;
}

template <typename T>
inline void store(T* address, const T& value, Order order, Scope scope) {
    emu::strong_store(address, &value, sizeof(T), order, scope);
}

template <typename T>
inline T rmw(T* address, const emu::RmwRequest& request, Order order, Scope scope) {
    return static_cast<T>(emu::strong_rmw(address, sizeof(T), request, order, scope));
}

}  // namespace emulated

#define DEEPCOMM_DEFINE_ATOM(name, op, type, order, scope)                      \
    inline type name(type* address, type value) {                               \
        return emulated::rmw(address, {emu::Rmw::op, value}, emu::Order::order, \
                             emu::Scope::scope);                                \
    }

#define DEEPCOMM_DEFINE_CAS(name, type, order, scope)                              \
    inline type name(type* address, type expected, type desired) {                 \
        return emulated::rmw(address, {emu::Rmw::kCompareSwap, desired, expected}, \
                             emu::Order::order, emu::Scope::scope);                \
    }

#define DEEPCOMM_DEFINE_SCOPE(suffix, scope, type)                                        \
    inline type ld_relaxed_##suffix(const type* address) {                                \
        return emulated::load(address, emu::Order::kRelaxed, emu::Scope::scope);          \
    }                                                                                     \
    inline type ld_acquire_##suffix(const type* address) {                                \
        return emulated::load(address, emu::Order::kAcquire, emu::Scope::scope);          \
    }                                                                                     \
    inline void st_relaxed_##suffix(type* address, type value) {                          \
        emulated::store(address, value, emu::Order::kRelaxed, emu::Scope::scope);         \
    }                                                                                     \
    inline void st_release_##suffix(type* address, type value) {                          \
        emulated::store(address, value, emu::Order::kRelease, emu::Scope::scope);         \
    }                                                                                     \
    DEEPCOMM_DEFINE_ATOM(atom_add_relaxed_##suffix, kAdd, type, kRelaxed, scope)          \
    DEEPCOMM_DEFINE_ATOM(atom_add_acquire_##suffix, kAdd, type, kAcquire, scope)          \
    DEEPCOMM_DEFINE_ATOM(atom_add_release_##suffix, kAdd, type, kRelease, scope)          \
    DEEPCOMM_DEFINE_ATOM(atom_add_acq_rel_##suffix, kAdd, type, kAcqRel, scope)           \
    DEEPCOMM_DEFINE_ATOM(atom_or_relaxed_##suffix, kOr, type, kRelaxed, scope)            \
    DEEPCOMM_DEFINE_ATOM(atom_exchange_acq_rel_##suffix, kExchange, type, kAcqRel, scope) \
    DEEPCOMM_DEFINE_CAS(atom_cas_relaxed_##suffix, type, kRelaxed, scope)                 \
    DEEPCOMM_DEFINE_CAS(atom_cas_acq_rel_##suffix, type, kAcqRel, scope)                  \
    inline void red_add_relaxed_##suffix(type* address, type value) {                     \
        (void)atom_add_relaxed_##suffix(address, value);                                  \
    }                                                                                     \
    inline void red_add_release_##suffix(type* address, type value) {                     \
        (void)atom_add_release_##suffix(address, value);                                  \
    }

#define DEEPCOMM_DEFINE_TYPE(type)             \
    DEEPCOMM_DEFINE_SCOPE(block, kBlock, type) \
    DEEPCOMM_DEFINE_SCOPE(gpu, kGpu, type)     \
    DEEPCOMM_DEFINE_SCOPE(sys, kSys, type)

DEEPCOMM_DEFINE_TYPE(uint32_t)
DEEPCOMM_DEFINE_TYPE(uint64_t)

#undef DEEPCOMM_DEFINE_TYPE
#undef DEEPCOMM_DEFINE_SCOPE
#undef DEEPCOMM_DEFINE_CAS
#undef DEEPCOMM_DEFINE_ATOM

inline Vec128 ld_relaxed_sys(const Vec128* address) {
    return emulated::load(address, emu::Order::kRelaxed, emu::Scope::kSys);
}

inline void st_relaxed_sys(Vec128* address, const Vec128& value) {
    emulated::store(address, value, emu::Order::kRelaxed, emu::Scope::kSys);
}

inline Vec128 ld_weak_streaming(const Vec128* address) { return *address; }

inline void st_weak_streaming(Vec128* address, const Vec128& value) { *address = value; }

inline void fence_acq_rel_block() { emu::fence_acq_rel(emu::Scope::kBlock); }
inline void fence_acq_rel_gpu() { emu::fence_acq_rel(emu::Scope::kGpu); }
inline void fence_acq_rel_sys() { emu::fence_acq_rel(emu::Scope::kSys); }
inline void fence_sc_gpu() { emu::fence_sc(emu::Scope::kGpu); }
inline void fence_sc_sys() { emu::fence_sc(emu::Scope::kSys); }

}  // namespace deepcomm::device
