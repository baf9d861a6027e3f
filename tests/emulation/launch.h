// A launch: runs block after block, and in each the runnable threads, in order or shuffled; asynchronous operations
// complete when no thread can run. If threads are shuffled, one warp or thread after another is slow: it runs when all
// others wait for it, so that they get ahead where nothing makes them wait. Every detected mistake ends the launch with
// a std::runtime_error.
#pragma once
#include <setjmp.h>
#include <signal.h>

#include <cstdlib>

#include "wgmma.h"

namespace emulation {

inline sigjmp_buf jump;

inline std::string deadlock() {
  std::map<std::string, std::pair<int, std::string>> waiting;  // reason: number of threads, and examples
  for (const Fiber& fiber : block->fibers) {
    if (fiber.done) continue;
    auto& [count, examples] = waiting[fiber.waits_for];
    if (count++ < 4) examples += " " + std::to_string(fiber.number);
  }
  std::string text = "deadlock";
  for (const auto& [what, who] : waiting)
    text += "\n  " + std::to_string(who.first) + " threads (" + who.second + " …) wait for " + what;
  for (const auto& [address, barrier] : block->mbarriers)
    text += "\n  the mbarrier at shared+" + std::to_string(address) + ": phase " + std::to_string(barrier.phase) +
            " lacks " + std::to_string(barrier.missing) + " arrivals and " + std::to_string(barrier.missing_bytes) +
            " bytes";
  return text;
}

inline void check_end() {
  if (!block->loads.empty()) fail("the kernel ends while a TMA load is in flight");
  int registers = 0;
  for (const Fiber& fiber : block->fibers) registers += fiber.registers;
  if (registers > 65536) fail("setmaxnreg asks for %d registers, an SM has 65536", registers);
  for (uint32_t i = DYNAMIC_START + block->dynamic_bytes; i < guard_start(); ++i)
    if ((unsigned char)window[i] != POISON) fail("a write past the launch's shared memory");
}

inline void run_block() {
  std::vector<uint32_t> order;
  for (Fiber& fiber : block->fibers) {
    start(fiber, (uint32_t)order.size());
    order.push_back((uint32_t)order.size());
  }
  // Threads slow * slow_threads … (slow + 1) * slow_threads - 1 are slow, or none for some more rounds.
  int slow = -1, slow_threads = 32, rounds_without = 0;
  for (size_t live = order.size(); live > 0;) {
    bool progress = false;
    if (seed && slow < 0 && --rounds_without < 0) {
      slow_threads = random_bits() % 2 ? 32 : 1;
      slow = (int)(random_bits() % (uint32_t)order.size()) / slow_threads;
    }
    if (seed) std::shuffle(order.begin(), order.end(), random_bits);
    for (const uint32_t number : order) {
      current = &block->fibers[number];
      if (!current->can_run() || current->number / slow_threads == slow) continue;
      to_current();
      if (!block->error.empty()) throw std::runtime_error(block->error);
      live -= current->done;
      progress = true;
    }
    current = nullptr;
    if (progress) continue;
    if (seed && random_bits() % 2 && finish_a_load()) continue;
    if (complete_a_wgmma() || finish_a_load()) continue;
    if (slow < 0) fail("%s", deadlock().c_str());
    slow = -1, rounds_without = 16;
  }
  check_end();
}

// Turn segmentation faults into errors like all others.
inline void on_fault(int, siginfo_t* info, void*) {
  const ptrdiff_t offset = (char*)info->si_addr - window;
  const std::string thread = std::to_string(current ? current->number : -1);
  const bool shared = offset >= 0 && offset < (ptrdiff_t)WINDOW;
  block->error = "thread " + thread + (shared ? " accesses shared+" + std::to_string(offset) : " accesses no memory") +
                 ", out of bounds";
  siglongjmp(jump, 1);
}

class FaultHandler {
 public:
  FaultHandler() {
    const stack_t handler_stack = {stack_.data(), 0, stack_.size()};
    sigaltstack(&handler_stack, &previous_stack_);
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &previous_);
  }
  ~FaultHandler() {
    sigaction(SIGSEGV, &previous_, nullptr);
    sigaltstack(&previous_stack_, nullptr);
  }

 private:
  struct sigaction previous_;
  stack_t previous_stack_;
  std::vector<char> stack_ = std::vector<char>(64 << 10);
};

// BERTFAST_EMULATION_SEED shuffles the threads.
inline void run_grid(uint32_t blocks, uint32_t threads, uint32_t dynamic_bytes, Work kernel) {
  const char* const text = getenv("BERTFAST_EMULATION_SEED");
  seed = text ? atoi(text) : 0;
  random_bits.seed((uint32_t)seed);
  if (threads < 1 || threads > THREADS) throw std::runtime_error("the launch failed: a block has 1 to 1024 threads");
  if (dynamic_bytes > MAX_SHARED_BYTES)
    throw std::runtime_error("the launch failed: a block has at most 227 KiB of shared memory");
  const FaultHandler handler;
  for (uint32_t i = 0; i < blocks; ++i) {
    block = std::make_unique<Block>();
    block->index = {i, 0, 0}, block->threads = {threads}, block->grid = {blocks};
    block->dynamic_bytes = dynamic_bytes;
    block->kernel = kernel;
    block->fibers.resize(threads), block->warps.resize((threads + 31) / 32);
    block->warpgroups.resize((threads + 127) / 128);
    prepare_shared_memory();
    if (sigsetjmp(jump, 1)) throw std::runtime_error(block->error);
    run_block();
  }
}

}  // namespace emulation
