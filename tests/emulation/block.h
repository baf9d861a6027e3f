// State of the running block. One block runs at a time, and its threads take turns on fibers.
#pragma once
#include <array>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

struct dim3 {
  uint32_t x = 1, y = 1, z = 1;
};
struct float2 {
  float x, y;
};

namespace emulation {

using Work = std::function<void()>;

// Counts arrivals. `generation` increases when all threads have arrived; waiting threads watch it.
struct Barrier {
  uint32_t generation = 0, arrived = 0, needed = 0;
  const char* what = "";
};

struct MBarrier {
  uint32_t arrivals, missing;  // in each phase; in this one
  int64_t missing_bytes;
  uint32_t phase;
  bool shown_to_tma;
};

// Contents of a tensor map. strides[0] is the element size; span that of the swizzle, 16 if there is none.
struct TensorMap {
  char* data;
  uint64_t sizes[5], strides[5];
  uint32_t box[5], rank, span;

  uint32_t rows() const {
    uint32_t count = 1;
    for (uint32_t i = 1; i < rank; ++i) count *= box[i];
    return count;
  }
  uint32_t box_bytes() const { return rows() * box[0] * (uint32_t)strides[0]; }
};

// A TMA load in flight to `shared`, whose bytes arrive at `barrier`.
struct Load {
  TensorMap map;
  std::array<int, 5> origin;
  uint32_t shared, barrier;
};

// A thread's asynchronous copies, in commit groups. They happen as late as possible.
struct CommitGroups {
  std::vector<Work> open;
  std::deque<std::vector<Work>> committed;

  void commit() { committed.push_back(std::exchange(open, {})); }
  void wait(size_t keep) {
    for (; committed.size() > keep; committed.pop_front())
      for (Work& work : committed.front()) work();
  }
  bool idle() const { return open.empty() && committed.empty(); }
};

using Result = std::vector<float>;      // 64 x N of a wgmma in flight: element (m, n) at [n * 64 + m]
using Operand = std::vector<uint16_t>;  // of depth 16: element (mn, k) at [k * extent + mn]

struct Wgmma {
  uint64_t descriptor_a, descriptor_b;
  bool a_in_registers, a_transposed, b_transposed, adds;
  float (*widen)(uint16_t);
  std::shared_ptr<Result> result = {};
  Operand a = {}, b = {};  // as they were read
  int issued_by = 0;       // threads; the operands are read when the last one issues
};

struct Warpgroup {
  std::deque<Wgmma> wgmmas;
  uint32_t multiplied = 0, completed = 0;
};

// A thread's accumulator registers of a wgmma in flight.
struct Owned {
  float* registers;
  int count;
  std::shared_ptr<Result> result;
  uint32_t last;  // wgmma that adds to it
};

struct Fiber {
  void* stack_pointer = nullptr;
  dim3 index;
  int number = 0;
  bool done = false;
  const uint32_t* watched = nullptr;  // the thread waits while *watched < goal
  uint32_t goal = 0;
  std::string waits_for;
  CommitGroups copies, stores;
  bool fenced = false;  // whether fence_wgmma was called since the last access to accumulators
  uint32_t issued = 0;  // wgmmas
  std::vector<uint32_t> committed;
  std::vector<Owned> owned;
  int registers = 0;  // requested by setmaxnreg

  bool can_run() const { return !done && (watched == nullptr || *watched >= goal); }
};

struct Warp {
  Barrier barrier;
  unsigned char slots[2][32][64];
};

struct Block {
  dim3 index, threads, grid;
  uint32_t dynamic_bytes = 0, shared_end = 0;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  Barrier barriers[16];
  std::map<uint32_t, MBarrier> mbarriers;
  std::map<const void*, uint32_t> arrays;
  std::vector<Load> loads;
  Work kernel;
  std::string error;
};

inline std::unique_ptr<Block> block;
inline Fiber* current;  // thread that runs
inline int seed;        // 0: threads run in order
inline std::mt19937 random_bits;

__attribute__((format(printf, 1, 2))) [[noreturn]] inline void fail(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  const std::string thread = current ? ", thread " + std::to_string(current->number) : "";
  throw std::runtime_error("block " + std::to_string(block->index.x) + thread + ": " + text);
}

}  // namespace emulation
