// A block's shared memory: 1024 bytes reserved by the system, the dynamic part, a guard page, the static arrays.
//
// It is initialised to NaN. There are two copies: threads access `window`; TMA and wgmma access `async_view`, which
// receives a thread's writes at its fence_proxy.
#pragma once
#include <cstring>

#include "fibers.h"

namespace emulation {

constexpr uint32_t WINDOW = 1 << 18;      // descriptors have addresses of 18 bits
constexpr uint32_t DYNAMIC_START = 1024;  // the first 1024 bytes are reserved
constexpr uint32_t MAX_SHARED_BYTES = 227 << 10;
constexpr int POISON = 0xff;

inline char *window, *async_view;

inline uint32_t guard_start() { return (DYNAMIC_START + block->dynamic_bytes + PAGE - 1) / PAGE * PAGE; }
inline uint32_t arrays_start() { return guard_start() + PAGE; }

// The shared-memory address of `bytes` bytes, all of which must belong to the block.
inline uint32_t address_of(const void* pointer, uint32_t bytes = 1, uint32_t alignment = 1) {
  const ptrdiff_t offset = (const char*)pointer - window;
  const bool dynamic = offset >= DYNAMIC_START && offset + bytes <= DYNAMIC_START + block->dynamic_bytes;
  const bool array = offset >= arrays_start() && offset + bytes <= block->shared_end;
  if (!dynamic && !array) fail("%u bytes at shared+%td are not in this block's shared memory", bytes, offset);
  if (offset % alignment) fail("shared+%td is not a multiple of %u bytes", offset, alignment);
  return (uint32_t)offset;
}

inline void open_pages(uint32_t begin, uint32_t end) {
  mprotect(window + begin, end - begin, PROT_READ | PROT_WRITE);
  memset(window + begin, POISON, end - begin);
  memset(async_view + begin, POISON, end - begin);
}

inline void prepare_shared_memory() {
  if (window == nullptr) {
    const auto map = [] {
      return (char*)mmap(nullptr, WINDOW, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    };
    window = map(), async_view = map();
  }
  mprotect(window, WINDOW, PROT_NONE);
  open_pages(0, guard_start());
  block->shared_end = arrays_start();
}

// The array of a declaration, identified by the address of a static variable.
inline void* shared_array(const void* declaration, size_t bytes) {
  const auto [entry, is_new] = block->arrays.try_emplace(declaration, block->shared_end);
  if (is_new) {
    const uint32_t end = entry->second + (uint32_t)(bytes + 15) / 16 * 16;
    if (end - arrays_start() + block->dynamic_bytes > MAX_SHARED_BYTES) fail("more than 227 KiB of shared memory");
    const uint32_t opened = (entry->second + PAGE - 1) / PAGE * PAGE;
    if (end > opened) open_pages(opened, (end + PAGE - 1) / PAGE * PAGE);
    block->shared_end = end;
  }
  return window + entry->second;
}

// Make all writes visible to TMA and wgmma, those of other threads too: a missing fence goes undetected if another
// thread issues one.
inline void show_writes() {
  const auto show = [](uint32_t begin, uint32_t bytes) { memcpy(async_view + begin, window + begin, bytes); };
  show(DYNAMIC_START, block->dynamic_bytes);
  show(arrays_start(), block->shared_end - arrays_start());
}

inline uint32_t swizzle(uint32_t address, uint32_t span) { return address ^ (address >> 3 & (span - 16)); }

}  // namespace emulation
