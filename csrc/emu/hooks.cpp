// SPDX-License-Identifier: Apache-2.0
// Plain accesses of units compiled with -fsanitize=thread arrive here, so kernels write `*p` as on
// the GPU. The sanitizer's own run time is not linked. Compile this file without the flag.
#include <cstddef>

#include "emu/device_api.hpp"

using deepcomm::emu::weak_read;
using deepcomm::emu::weak_write;

#define DEEPCOMM_HOOKS_OF_SIZE(size)                                    \
    void __tsan_read##size(void* p) { weak_read(p, size); }             \
    void __tsan_write##size(void* p) { weak_write(p, size); }           \
    void __tsan_unaligned_read##size(void* p) { weak_read(p, size); }   \
    void __tsan_unaligned_write##size(void* p) { weak_write(p, size); } \
    void __tsan_volatile_read##size(void* p) { weak_read(p, size); }    \
    void __tsan_volatile_write##size(void* p) { weak_write(p, size); }

extern "C" {
DEEPCOMM_HOOKS_OF_SIZE(1)
DEEPCOMM_HOOKS_OF_SIZE(2)
DEEPCOMM_HOOKS_OF_SIZE(4)
DEEPCOMM_HOOKS_OF_SIZE(8)
DEEPCOMM_HOOKS_OF_SIZE(16)

void __tsan_read_range(void* p, size_t n) { weak_read(p, n); }
void __tsan_write_range(void* p, size_t n) { weak_write(p, n); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void** /*vptr*/, void* /*value*/) {}
void __tsan_vptr_read(void** /*vptr*/) {}
}
