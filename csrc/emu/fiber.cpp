// SPDX-License-Identifier: Apache-2.0
#include "emu/fiber.hpp"

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace deepcomm::emu {

namespace {
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 << 10;  // redzones make frames several times larger
#else
constexpr size_t kStackBytes = 64 << 10;
#endif
// An odd number of lines between stacks spreads the stack tops over the cache's sets.
constexpr size_t kStackStride = kStackBytes + 64;
constexpr size_t kStacksPerChunk = 256;
constexpr uint64_t kCanary = 0x5AFEC0DE5AFEC0DEull;
}  // namespace

Stack StackPool::get(size_t index) {
    while (chunks_.size() * kStacksPerChunk <= index) {
        const size_t num_bytes = kStacksPerChunk * kStackStride;
        void* base = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (base == MAP_FAILED) {
            std::fprintf(stderr, "emulator: no memory for %zu bytes of stacks\n", num_bytes);
            std::abort();
        }
        madvise(base, num_bytes, MADV_NOHUGEPAGE);
        chunks_.push_back({static_cast<char*>(base), num_bytes});
    }
    char* chunk = chunks_[index / kStacksPerChunk].base;
    return {chunk + (index % kStacksPerChunk) * kStackStride, kStackBytes};
}

bool StackPool::contains(const void* address) const {
    const char* byte = static_cast<const char*>(address);
    for (const Chunk& chunk : chunks_) {
        if (byte >= chunk.base && byte < chunk.base + chunk.num_bytes) return true;
    }
    return false;
}

bool is_overrun(const Context& context) {
    uint64_t word = 0;
    std::memcpy(&word, context.stack.base, sizeof word);
    return word != kCanary;
}

/// Clears the address sanitizer's poison of who had the stack before, and left it by a switch.
static void forget_frames([[maybe_unused]] Stack stack) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack.base, stack.num_bytes);
#endif
}

// ---- the switch itself

#if defined(__x86_64__)
// Top-level assembly, not inline: no red zone or spill of the compiler can lie across it.
extern "C" void deepcomm_emu_switch(void** save_stack_pointer, void* load_stack_pointer);
asm(R"(
.text
.globl deepcomm_emu_switch
.type deepcomm_emu_switch,@function
.p2align 4
deepcomm_emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size deepcomm_emu_switch,.-deepcomm_emu_switch
)");

void prepare(Context& context, Stack stack, void (*entry)()) {
    constexpr size_t kSavedRegisters = 6;
    forget_frames(stack);
    std::memcpy(stack.base, &kCanary, sizeof kCanary);
    const uintptr_t top =
        reinterpret_cast<uintptr_t>(stack.base + stack.num_bytes) & ~uintptr_t{63};
    void** slot = reinterpret_cast<void**>(top) - 2;  // entry starts as if called: sp % 16 == 8
    slot[0] = reinterpret_cast<void*>(entry);
    slot[1] = nullptr;
    slot -= kSavedRegisters;
    std::memset(slot, 0, kSavedRegisters * sizeof(void*));
    context = {slot, stack};
}

static void jump(Context& from, Context& to) {
    deepcomm_emu_switch(&from.stack_pointer, to.stack_pointer);
}
#else
void prepare(Context& context, Stack stack, void (*entry)()) {
    forget_frames(stack);
    std::memcpy(stack.base, &kCanary, sizeof kCanary);
    auto* state = new (stack.base + 64) ucontext_t;
    getcontext(state);
    state->uc_stack = {stack.base + 4096, 0, stack.num_bytes - 4096};
    state->uc_link = nullptr;
    makecontext(state, entry, 0);
    context = {state, stack};
}

static void jump(Context& from, Context& to) {
    static ucontext_t host;
    if (!from.stack_pointer) from.stack_pointer = &host;
    swapcontext(static_cast<ucontext_t*>(from.stack_pointer),
                static_cast<ucontext_t*>(to.stack_pointer));
}
#endif

#if defined(__SANITIZE_ADDRESS__)
static const void* host_base;
static size_t host_bytes;

void on_first_entry() {
    const void* base;
    size_t num_bytes;
    __sanitizer_finish_switch_fiber(nullptr, &base, &num_bytes);
    if (!host_base) host_base = base, host_bytes = num_bytes;  // the first switch leaves the host
}

void switch_context(Context& from, Context& to, bool from_is_finished) {
    void* fake_stack = nullptr;
    const bool to_host = to.stack.base == nullptr;
    __sanitizer_start_switch_fiber(from_is_finished ? nullptr : &fake_stack,
                                   to_host ? host_base : to.stack.base,
                                   to_host ? host_bytes : to.stack.num_bytes);
    jump(from, to);
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}
#else
void on_first_entry() {}

void switch_context(Context& from, Context& to, bool /*from_is_finished*/) { jump(from, to); }
#endif

}  // namespace deepcomm::emu
