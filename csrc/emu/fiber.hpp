// SPDX-License-Identifier: Apache-2.0
// Stacks and the switch between them. Owns no policy: the scheduler says who runs.
#pragma once

#include <cstddef>
#include <vector>

namespace deepcomm::emu {

struct Stack {
    char* base = nullptr;  ///< lowest address
    size_t num_bytes = 0;
};

/// Stacks that live as long as the process: the n-th fiber of every run gets the n-th stack.
class StackPool {
  public:
    Stack get(size_t index);
    /// Whether address lies in any stack of the pool.
    bool contains(const void* address) const;

  private:
    struct Chunk {
        char* base;
        size_t num_bytes;
    };
    std::vector<Chunk> chunks_;
};

/// One suspended flow of control.
struct Context {
    void* stack_pointer = nullptr;
    Stack stack;  ///< empty for the host's own stack
};

/// Makes the first switch to context call entry, which must never return.
void prepare(Context& context, Stack stack, void (*entry)());

/// Suspends from and resumes to. A context that is finished is never resumed.
void switch_context(Context& from, Context& to, bool from_is_finished);

/// To be called first by an entry function.
void on_first_entry();

/// Whether the end of the stack was overwritten.
bool is_overrun(const Context& context);

}  // namespace deepcomm::emu
