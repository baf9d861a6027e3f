// Synchronisation of threads: barriers of a block, exchanges within a warp, and mbarriers.
#pragma once
#include "shared_memory.h"

namespace emulation {

inline void arrive(Barrier& barrier, uint32_t needed, const char* what) {
  may_switch();
  if (barrier.arrived == 0) barrier.needed = needed, barrier.what = what;
  if (barrier.needed != needed || strcmp(barrier.what, what) != 0)
    fail("%s for %u threads is also used as %s for %u", what, needed, barrier.what, barrier.needed);
  if (++barrier.arrived == needed) barrier.arrived = 0, ++barrier.generation;
}

inline void sync(Barrier& barrier, uint32_t needed, const char* what, int number = 0) {
  const uint32_t goal = barrier.generation + 1;
  arrive(barrier, needed, what);
  if (barrier.generation < goal)
    wait_until(&barrier.generation, goal, number ? std::string(what) + " " + std::to_string(number) : what);
}

inline Barrier& named_barrier(int number, int threads) {
  if (number < 0 || number > 15 || threads % 32) fail("named barrier %d for %d threads", number, threads);
  return block->barriers[number];
}

inline int lane() { return current->number % 32; }

// Every lane publishes a value and can read the others'. Two sets of slots alternate, so that one barrier is enough.
template <class T>
class Exchange {
 public:
  static_assert(sizeof(T) <= 64);

  Exchange(const T& mine, const char* what, uint32_t mask = ~0u) {
    Warp& warp = block->warps[current->number / 32];
    slots_ = warp.slots[warp.barrier.generation % 2];
    memcpy(slots_[lane()], &mine, sizeof mine);
    const size_t lanes = block->fibers.size() - current->number / 32 * 32;
    if (lanes < 32) mask &= (1u << lanes) - 1;
    sync(warp.barrier, (uint32_t)__builtin_popcount(mask), what);
  }

  T operator[](int from) const {
    T value;
    memcpy(&value, slots_[from % 32], sizeof value);
    return value;
  }

 private:
  unsigned char (*slots_)[64];
};

inline MBarrier& mbarrier(const void* pointer) {
  const uint32_t address = address_of(pointer, 8, 8);
  const auto found = block->mbarriers.find(address);
  if (found == block->mbarriers.end()) fail("the mbarrier at shared+%u was not initialised", address);
  if (*(const uint64_t*)pointer != address) fail("the mbarrier at shared+%u was overwritten", address);
  return found->second;
}

inline void complete_phase_if_done(MBarrier& barrier) {
  if (barrier.missing > 0 || barrier.missing_bytes != 0) return;
  barrier.missing = barrier.arrivals;
  ++barrier.phase;
}

}  // namespace emulation
