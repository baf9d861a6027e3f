// A stack for each thread of a block, and the step from one to another.
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

// Keeps the registers that a call must keep (System V) on this stack, and goes on where the other one stopped.
extern "C" void bertfast_switch_stack(void** save_here, void* go_on_at);
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

// Where another thread may come first.
inline void may_switch() {
  if (seed && random_bits() % 4 == 0) to_scheduler();
}

// The thread waits until *counter reaches the goal.
inline void wait_until(const uint32_t* counter, uint32_t goal, std::string what) {
  current->watched = counter, current->goal = goal, current->waits_for = std::move(what);
  to_scheduler();
  current->watched = nullptr;
}

// What a fiber runs.
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

// Stacks that end at a page which nobody may touch.
inline char* stacks() {
  static char* const memory = [] {
    void* const some = mmap(nullptr, THREADS * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (uint32_t i = 0; i < THREADS; ++i) mprotect((char*)some + i * STACK, PAGE, PROT_NONE);
    return (char*)some;
  }();
  return memory;
}

inline void start(Fiber& fiber, uint32_t number) {
  const dim3& threads = block->threads;
  fiber.number = (int)number;
  fiber.place = {number % threads.x, number / threads.x % threads.y, number / (threads.x * threads.y)};
  // The first switch pops six registers and returns into run_kernel, at the alignment that a call leaves.
  void** const top = (void**)(stacks() + (number + 1) * STACK);
  top[-2] = (void*)&run_kernel;
  fiber.stack_pointer = top - 8;
}

}  // namespace emulation
