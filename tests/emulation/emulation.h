// CUDA on a CPU, so that kernels can be tested where there is no GPU: hopper.cuh includes this for any compiler but
// nvcc.
//
// The emulation is adversarial: see launch.h, wgmma.h and copies.h. It does not detect races of plain reads and writes,
// nor an A operand in registers that is overwritten too early. The functions below are those of hopper.cuh, where they
// are documented. One launch at a time per process; no clusters, no two-dimensional grids.
#pragma once
#include <cmath>

#include "launch.h"

#undef UNROLL_FOR  // gcc has another pragma
#undef UNROLL_4_FOR
#undef ROLLED_FOR
#define UNROLL_FOR for
#define UNROLL_4_FOR for
#define ROLLED_FOR for
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (emulation::current->index)
#define blockIdx (emulation::block->index)
#define blockDim (emulation::block->threads)
#define gridDim (emulation::block->grid)

// Waits for all threads of the block: a thread that has returned from the kernel is missing.
inline void __syncthreads() {
  emulation::sync(emulation::block->barriers[0], (uint32_t)emulation::block->fibers.size(), "__syncthreads");
}
inline void __syncwarp(uint32_t mask = ~0u) { emulation::Exchange<int>(0, "__syncwarp", mask); }
template <class T>
T __shfl_sync(uint32_t mask, T value, int source) {
  return emulation::Exchange<T>(value, "__shfl_sync", mask)[source];
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes) {
  return emulation::Exchange<T>(value, "__shfl_xor_sync", mask)[emulation::lane() ^ lanes];
}
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t both = (uint64_t)y << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= (uint32_t)(both >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}

// clang-format off
#define SHARED_ARRAY(type, name, count) \
  type* const name = (type*)emulation::shared_array([] { static char key; return &key; }(), sizeof(type) * (count))
// clang-format on

namespace bertfast::cuda {

using emulation::block, emulation::current, emulation::fail;

DEVICE uint32_t shared_address(const void* pointer) { return emulation::address_of(pointer); }

template <int RANK>
struct TensorShape;

template <int RANK>
CUtensorMap tensor_map(const TensorShape<RANK>& shape) {
  return emulation::encode(shape.data, RANK, shape.sizes, shape.strides, shape.box, (uint32_t)shape.swizzle);
}

inline int sm_count() { return 2; }

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int blocks, int threads, int shared_bytes, Stream,
            const Arguments&... arguments) {
  emulation::run_grid((uint32_t)blocks, (uint32_t)threads, (uint32_t)shared_bytes,
                      [=] { kernel((Parameters)arguments...); });
}

template <class T>
T& shared_memory() {
  if (sizeof(T) > block->dynamic_bytes) fail("the launch has less shared memory than the kernel's struct");
  return *(T*)(emulation::window + emulation::DYNAMIC_START);
}

inline void init(uint64_t* barrier, uint32_t arrivals) {
  *barrier = emulation::address_of(barrier, 8, 8);  // checked later, to detect a barrier that was overwritten
  block->mbarriers[(uint32_t)*barrier] = {arrivals, arrivals, 0, 0, false};
}

inline void fence_init() {
  for (auto& [address, barrier] : block->mbarriers) barrier.shown_to_tma = true;
}

inline void arrive_expecting(uint64_t* pointer, uint32_t bytes) {
  emulation::may_switch();
  emulation::MBarrier& barrier = emulation::mbarrier(pointer);
  if (barrier.missing == 0) fail("more arrivals than the mbarrier at shared+%u has", shared_address(pointer));
  barrier.missing_bytes += bytes;
  --barrier.missing;
  emulation::complete_phase_if_done(barrier);
}

inline void arrive(uint64_t* barrier) { arrive_expecting(barrier, 0); }

inline void wait(uint64_t* pointer, uint32_t parity) {
  emulation::may_switch();
  emulation::MBarrier& barrier = emulation::mbarrier(pointer);
  while (barrier.phase % 2 == parity)
    emulation::wait_until(
        &barrier.phase, barrier.phase + 1,
        "the mbarrier at shared+" + std::to_string(shared_address(pointer)) + ", parity " + std::to_string(parity));
}

template <class... Coordinates>
void load_box(void* to, const CUtensorMap* map, uint64_t* barrier, Coordinates... coordinates) {
  emulation::begin_load(to, emulation::tensor_map(map, sizeof...(coordinates)), barrier, {coordinates...});
}

template <class... Coordinates>
void store_box(const CUtensorMap* map, const void* from, Coordinates... coordinates) {
  emulation::begin_store(emulation::tensor_map(map, sizeof...(coordinates)), from, {coordinates...});
}

inline void commit_stores() { current->stores.commit(); }
template <int PENDING>
void wait_stores() {
  current->stores.wait(PENDING);
}

inline void fence_proxy() { emulation::show_writes(); }

template <int... R>
void fence_wgmma([[maybe_unused]] float (&... d)[R]) {
  current->fenced = true;
}
template <class X, int R>
void keep_in_registers(X (&)[R]) {}
inline void commit_wgmma() { current->committed.push_back(current->issued); }
template <int PENDING, int... R>
void wait_wgmma([[maybe_unused]] float (&... d)[R]) {
  emulation::wait_wgmma(PENDING);
}

inline float widen(BFloat16 x) {
  const uint32_t word = (uint32_t)x.bits << 16;
  float value;
  memcpy(&value, &word, 4);
  return value;
}

inline float widen(Half x) {
  _Float16 value;
  memcpy(&value, &x, 2);
  return (float)value;
}

template <class T>
float widen_bits(uint16_t bits) {
  return widen(T{bits});
}

template <Major A, Major B, class T, int R>
void wgmma(T, float (&d)[R], uint64_t a, uint64_t b, bool add) {
  emulation::issue(d, R, nullptr, {a, b, false, A == Major::mn, B == Major::mn, add, widen_bits<T>});
}
template <Major B, class T, int R>
void wgmma(T, float (&d)[R], const uint32_t (&a)[4], uint64_t b, bool add) {
  emulation::issue(d, R, a, {0, b, true, false, B == Major::mn, add, widen_bits<T>});
}

template <int REGISTERS>
void setmaxnreg_inc() {
  static_assert(REGISTERS % 8 == 0 && REGISTERS >= 24 && REGISTERS <= 256);
  current->registers = REGISTERS;
}
template <int REGISTERS>
void setmaxnreg_dec() {
  setmaxnreg_inc<REGISTERS>();
}

template <int BARRIER>
void named_barrier_sync(int threads) {
  emulation::sync(emulation::named_barrier(BARRIER, threads), (uint32_t)threads, "named barrier", BARRIER);
}
template <int BARRIER>
void named_barrier_arrive(int threads) {
  emulation::arrive(emulation::named_barrier(BARRIER, threads), (uint32_t)threads, "named barrier");
}

// Which lane is elected is unspecified on a GPU, so the seed decides.
inline bool elect_one() {
  emulation::Exchange<int>(0, "elect_one");
  return emulation::lane() == emulation::seed % 32;
}

template <bool TRANSPOSED>
void load_matrices_as(uint32_t (&r)[4], const void* row) {
  using Row = std::array<uint16_t, 8>;
  emulation::address_of(row, 16, 16);
  const emulation::Exchange<Row> rows(*(const Row*)row, "ldmatrix");
  const int line = emulation::lane() / 4, column = emulation::lane() % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    const auto at = [&](int y, int x) -> uint32_t { return rows[i * 8 + y][x]; };
    r[i] = TRANSPOSED ? at(column, line) | at(column + 1, line) << 16 : at(line, column) | at(line, column + 1) << 16;
  }
}
inline void load_matrices(uint32_t (&r)[4], const void* row) { load_matrices_as<false>(r, row); }
inline void load_transposed(uint32_t (&r)[4], const void* row) { load_matrices_as<true>(r, row); }

inline void store_matrices(void* row, const uint32_t (&r)[4]) {
  emulation::address_of(row, 16, 16);
  const emulation::Exchange<std::array<uint32_t, 4>> fragments({r[0], r[1], r[2], r[3]}, "stmatrix");
  const int matrix = emulation::lane() / 8, line = emulation::lane() % 8;
  for (int column = 0; column < 8; ++column)
    ((uint16_t*)row)[column] = (uint16_t)(fragments[line * 4 + column / 2][matrix] >> (column % 2 * 16));
}

// A lane holds rows lane / 4 and lane / 4 + 8 of a and d, and columns 2 (lane % 4), the next, and those plus 8 of a; of
// b the transposed positions.
template <class T>
void mma(T, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  using Six = std::array<uint32_t, 6>;
  const emulation::Exchange<Six> lanes({a[0], a[1], a[2], a[3], b[0], b[1]}, "mma");
  const auto half = [](uint32_t pair, int which) { return widen(T{(uint16_t)(pair >> which * 16)}); };
  for (int i = 0; i < 4; ++i) {
    const int row = emulation::lane() / 4, below = i / 2, column = emulation::lane() % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int owner = k % 8 / 2, beyond = k / 8;
      d[i] +=
          half(lanes[row * 4 + owner][below + 2 * beyond], k % 2) * half(lanes[column * 4 + owner][4 + beyond], k % 2);
    }
  }
}

inline void copy_16(void* to, const void* from, int bytes = 16) {
  emulation::address_of(to, 16, 16);
  if ((uintptr_t)from % 16) fail("a copy from %p, which is not a multiple of 16", from);
  current->copies.open.push_back([=] {
    memset(to, 0, 16);
    memcpy(to, from, (size_t)bytes);
  });
}
inline void commit_copies() { current->copies.commit(); }
template <int PENDING>
void wait_copies() {
  current->copies.wait(PENDING);
}

inline float fast_exp2(float x) { return std::exp2(x); }
inline float fast_log2(float x) { return std::log2(x); }
inline float fast_reciprocal(float x) { return 1.f / x; }
inline float fast_rsqrt(float x) { return 1.f / std::sqrt(x); }

inline uint32_t sign_masks(uint32_t x, int byte) {
  const auto mask = [&](int which) { return x >> (8 * which + 7) & 1 ? 0xffffu : 0u; };
  return mask(byte) | mask(byte + 1) << 16;
}

// Round to nearest, ties to even; NaN stays NaN.
inline uint16_t narrow(BFloat16, float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return (uint16_t)(x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t narrow(Half, float x) {
  const _Float16 half = (_Float16)x;
  uint16_t bits;
  memcpy(&bits, &half, 2);
  return bits;
}
template <class T>
uint32_t pack(T type, float first, float second) {
  return narrow(type, first) | (uint32_t)narrow(type, second) << 16;
}

}  // namespace bertfast::cuda
