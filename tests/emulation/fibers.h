// One stack per thread of a block, and the switch between them.
#pragma once
#include <sys/mman.h>

#include "block.h"

#if !defined(__x86_64__)
#error "the emulation switches stacks as x86-64 does"
#endif

namespace emulation {

constexpr uint32_t PAGE = 4096, THREADS = 1024;
constexpr size_t STACK = 128 << 10;

inline void* scheduler_stack;

// Save the callee-saved registers (System V) on this stack, and resume the other one.
extern "C" void bertfast_switch_stack(void** saved_stack, void* resumed_stack);
asm(R"(
.weak bertfast_switch_stack
bertfast_switch_stack:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
)");

inline void to_scheduler() { bertfast_switch_stack(&current->stack_pointer, scheduler_stack); }
inline void to_current() { bertfast_switch_stack(&scheduler_stack, current->stack_pointer); }

// A point at which the scheduler may switch to another thread.
inline void may_switch() {
  if (seed && random_bits() % 4 == 0) to_scheduler();
}

// Suspend the thread until *counter reaches the goal.
inline void wait_until(const uint32_t* counter, uint32_t goal, std::string what) {
  current->watched = counter, current->goal = goal, current->waits_for = std::move(what);
  to_scheduler();
  current->watched = nullptr;
}

// The entry point of a fiber.
inline void run_kernel() {
  try {
    block->kernel();
    if (!current->owned.empty()) fail("the kernel ends without waiting for a wgmma");
    if (!current->stores.idle()) fail("the kernel ends without committing or waiting for a TMA store");
    if (!current->copies.idle()) fail("the kernel ends without committing or waiting for a copy");
  } catch (const std::exception& error) {
    block->error = error.what();
  }
  current->done = true;
  to_scheduler();
}

// Stacks that end at a guard page.
inline char* stacks() {
  static char* const memory = [] {
    void* const pages = mmap(nullptr, THREADS * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (uint32_t i = 0; i < THREADS; ++i) mprotect((char*)pages + i * STACK, PAGE, PROT_NONE);
    return (char*)pages;
  }();
  return memory;
}

inline void start(Fiber& fiber, uint32_t number) {
  const dim3& threads = block->threads;
  fiber.number = (int)number;
  fiber.index = {number % threads.x, number / threads.x % threads.y, number / (threads.x * threads.y)};
  // The first switch pops six registers and returns into run_kernel, at the alignment that a call leaves.
  void** const top = (void**)(stacks() + (number + 1) * STACK);
  top[-2] = (void*)&run_kernel;
  fiber.stack_pointer = top - 8;
}

}  // namespace emulation
