// The instructions that C++ has no words for, each as a function: mbarriers, TMA, products of warpgroups (wgmma) and of
// warps (mma), named barriers, moves of matrices. This is the only file with assembly in it.
//
// Kernels include this and nothing of CUDA. nvcc makes the instructions of these functions; any other C++20 compiler
// takes the same names from `emulation.h` of tests/emulation, which runs them on a CPU. What needs Hopper traps on
// other chips, so that one source is compiled for all of them. Sections are those of NVIDIA's PTX ISA.
#pragma once
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__CUDACC__)
#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>
#endif

#include "../tensors.h"

namespace bertfast::cuda {

using Stream = void*;

// How a tile's 16-byte chunks are exchanged within spans of as many bytes, so that columns lie in different banks.
enum class Swizzle { none, span32, span64, span128 };

// Which index of an operand runs along its rows in memory: the product's K, or M (or N), so that it is read transposed.
enum class Major { k, mn };

// 16 bytes, which one instruction moves.
struct alignas(16) Words4 {
  uint32_t word[4];
};

}  // namespace bertfast::cuda

#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define UNROLL_SOME _Pragma("unroll 4")  // so that some loads are under way together

#if defined(__CUDACC__)
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HOPPER(...) asm volatile(__VA_ARGS__)
#else
#define HOPPER(...) __trap()
#endif

namespace bertfast::cuda {
DEVICE uint32_t shared_address(const void* pointer) { return (uint32_t)__cvta_generic_to_shared(pointer); }
}  // namespace bertfast::cuda
#else
#include "emulation.h"
#endif

namespace bertfast::cuda {

// ---- Tiles in shared memory

__host__ __device__ constexpr int span_of(Swizzle swizzle) { return 16 << (int)swizzle; }

// The number of a 16-byte chunk, exclusive or that of its line of 128 bytes (address bits 7 to 9).
__host__ __device__ constexpr uint32_t swizzled(uint32_t address, Swizzle swizzle) {
  return address ^ ((address >> 3) & (uint32_t)(span_of(swizzle) - 16));
}

// ROWS x COLUMNS 16-bit numbers, as wgmma reads and TMA writes them: in panels of the width of a swizzle's span, each
// with its part of row 0, row 1, …. A panel is what one TMA box {PANEL, ROWS} writes. Tiles start at multiples of 1024
// bytes, for the pattern follows the address.
template <int ROWS, int COLUMNS, Swizzle SWIZZLE = (COLUMNS >= 64 ? Swizzle::span128 : Swizzle::span64)>
struct Tile {
  static constexpr Swizzle swizzle = SWIZZLE;
  static constexpr int SPAN = span_of(SWIZZLE), PANEL = SPAN / 2, PANELS = COLUMNS / PANEL;
  static constexpr int PANEL_BYTES = ROWS * SPAN, BYTES = PANELS * PANEL_BYTES;
  static_assert(ROWS % 8 == 0, "the pattern repeats every 8 rows");
  static_assert(COLUMNS % PANEL == 0, "a tile is made of whole panels");

  alignas(1024) unsigned char bytes[BYTES];

  // Where an element is; 16 bytes from a multiple of 8 columns on stay together.
  DEVICE void* at(int row, int column) {
    return bytes + swizzled(column / PANEL * PANEL_BYTES + row * SPAN + column % PANEL * 2, SWIZZLE);
  }

  // The wgmma descriptor of the slice of depth 16 from `depth` on, for M (or N) from `first` on. (Section "Shared Memory
  // Matrix Layout": fields of 14 bits count 16 bytes; start at bit 0, leading offset at 16, stride offset at 32, and the
  // mode of swizzling at 62.)
  template <Major MAJOR>
  DEVICE uint64_t slice(int depth, int first = 0) const {
    constexpr uint32_t rows8 = 8 * SPAN, panel = PANEL_BYTES;
    constexpr bool plain = SWIZZLE == Swizzle::none;
    const int row = MAJOR == Major::k ? first : depth, column = MAJOR == Major::k ? depth : first;
    const uint32_t start = column / PANEL * panel + column % PANEL * 2 + row * SPAN;
    // 32 bytes of each row, which reach into a second panel only where a panel has 16; or 16 rows. Leading and stride
    // trade places between the plain layout and the swizzled ones.
    if constexpr (MAJOR == Major::k) return descriptor(start, plain ? panel : 16, rows8);
    else return descriptor(start, plain ? rows8 : panel, plain ? panel : rows8);
  }

 private:
  DEVICE uint64_t descriptor(uint32_t start, uint32_t leading, uint32_t stride) const {
    constexpr uint64_t mode = SWIZZLE == Swizzle::none ? 0 : 4 - (uint64_t)SWIZZLE;
    const auto field = [](uint32_t count) { return (uint64_t)((count & 0x3ffff) >> 4); };
    return field(shared_address(bytes) + start) | field(leading) << 16 | field(stride) << 32 | mode << 62;
  }
};

// ---- Fragments: how the threads of a warpgroup hold the 64 rows of a product, d[i] of each

DEVICE int fragment_row(int i) { return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + i / 2 % 2 * 8; }
DEVICE int fragment_column(int i) { return i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2; }

// ---- Tensor maps, on the host

// 16-bit numbers in memory for TMA: sizes and a box in elements, the innermost first, `strides` in bytes from the second
// dimension on. What lies outside reads as zero.
template <int RANK>
struct TensorShape {
  const void* data;
  uint64_t sizes[RANK], strides[RANK - 1];
  uint32_t box[RANK];
  Swizzle swizzle;
};

#if defined(__CUDACC__)  // all else in this file; the emulation has these functions too

// Throws what CUDA says of an error.
inline void check(cudaError_t error, const char* when) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(when) + ": " + cudaGetErrorString(error));
}

template <int RANK>
CUtensorMap tensor_map(const TensorShape<RANK>& shape) {
  // Looked up when it is needed: the library links no libcuda, and loads where there is no driver.
  void* encode = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const char* const name = "cuTensorMapEncodeTiled";
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &encode, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &encode, cudaEnableDefault, &found);
#endif
  check(error, "looking up cuTensorMapEncodeTiled in the driver");
  if (found != cudaDriverEntryPointSuccess || encode == nullptr)
    throw std::runtime_error("the driver is older than CUDA 12.0 and has no cuTensorMapEncodeTiled: update the driver");
  constexpr uint32_t steps[5] = {1, 1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result = ((PFN_cuTensorMapEncodeTiled_v12000)encode)(
      &map, CU_TENSOR_MAP_DATA_TYPE_UINT16, RANK, const_cast<void*>(shape.data), shape.sizes, shape.strides, shape.box,
      steps, CU_TENSOR_MAP_INTERLEAVE_NONE, (CUtensorMapSwizzle)shape.swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check((cudaError_t)result, name);  // the driver's codes are the runtime's
  return map;
}

// ---- Launches, on the host

// Of the current device.
inline int multiprocessors() {
  static thread_local int known[64];
  int device = 0;
  check(cudaGetDevice(&device), "asking for the current GPU");
  int& count = known[device % 64];
  if (count == 0)
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "counting the SMs of the GPU");
  return count;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int blocks, int threads, int shared_bytes, Stream stream,
            const Arguments&... arguments) {
  check(cudaGetLastError(), "an error that earlier work on this GPU has left");
  if (blocks == 0) return;
  if (shared_bytes > 48 << 10)  // more has to be asked for
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), "shared memory");
  kernel<<<blocks, threads, shared_bytes, (cudaStream_t)stream>>>((Parameters)arguments...);
  check(cudaGetLastError(), "the launch failed");
}

// ---- Shared memory

// An array of the block, and the launch's shared memory as a struct.
#define SHARED_ARRAY(type, name, count) __shared__ __align__(16) type name[count]

template <class T>
DEVICE T& shared_memory() {
  extern __shared__ __align__(1024) unsigned char bertfast_shared_memory[];
  return *reinterpret_cast<T*>(bertfast_shared_memory);
}

// ---- mbarriers

DEVICE void init(uint64_t* barrier, uint32_t arrivals) {
  HOPPER("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Shows TMA what was initialised; a __syncthreads must follow before other threads use the barriers.
DEVICE void fence_init() { HOPPER("fence.mbarrier_init.release.cluster;" ::: "memory"); }

DEVICE void arrive(uint64_t* barrier) {
  HOPPER("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and lets the phase wait for so many bytes more.
DEVICE void arrive_expecting(uint64_t* barrier, uint32_t bytes) {
  HOPPER("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

// Until the phase of this parity has completed. A new barrier is in phase 0: who waits for parity 1 passes.
DEVICE void wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done = 0;
  while (!done)
    HOPPER("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
           : "=r"(done) : "r"(shared_address(barrier)), "r"(parity) : "memory");
}

// ---- TMA

// One thread copies the box at these coordinates; its bytes arrive at `barrier`.
DEVICE void load_box(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y) {
  HOPPER("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
             shared_address(to)), "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y) : "memory");
}
DEVICE void load_box(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y, int z) {
  HOPPER("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
         ::"r"(shared_address(to)), "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z) : "memory");
}

// The other way; before it fence_proxy by the writers and a barrier, after it commit_stores and wait_stores.
DEVICE void store_box(const CUtensorMap* map, const void* from, int x, int y) {
  HOPPER("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
         "r"(shared_address(from)), "r"(x), "r"(y) : "memory");
}
DEVICE void commit_stores() { HOPPER("cp.async.bulk.commit_group;" ::: "memory"); }

// Until at most PENDING of this thread's groups still read shared memory.
template <int PENDING>
DEVICE void wait_stores() { HOPPER("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory"); }

// Orders this thread's writes to shared memory before what wgmma and TMA do there later.
DEVICE void fence_proxy() { HOPPER("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- Products of a warpgroup

// Keeps registers where they are: the compiler cannot see that wgmma works beside it.
template <int R>
DEVICE void pin(float (&d)[R]) {
  UNROLL for (int i = 0; i < R; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Before the first product, and after each ordinary access to its results or to the registers of its first operand.
template <int... R>
DEVICE void fence_products(float (&... d)[R]) {
  (pin(d), ...);
  HOPPER("wgmma.fence.sync.aligned;" ::: "memory");
}

DEVICE void commit_products() { HOPPER("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most PENDING groups are under way. Names the results that are used next.
template <int PENDING, int... R>
DEVICE void wait_products(float (&... d)[R]) {
  HOPPER("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
  (pin(d), ...);
}

#define D_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define D_16 D_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define D_32 D_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define D_64                                                                                                       \
  D_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
       "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define R_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define R_8(i) R_4(i), R_4(i + 4)
#define R_16(i) R_8(i), R_8(i + 8)
#define R_32(i) R_16(i), R_16(i + 16)
#define R_64(i) R_32(i), R_32(i + 32)

// d [64, N] (+)= a [64, 16] b [16, N], N = 2 R: a and b in shared memory, or a in registers, as 16-bit pairs. One
// overload for each type and N: the operands behind the results have other numbers in each, p0 to p6. ("1, 1" are the
// signs of a and b.)
#define PRODUCT(T, name, N, R, p0, p1, p2, p3, p4, p5, p6)                                                          \
  template <Major A, Major B>                                                                                       \
  DEVICE void multiply(T, float (&d)[R], uint64_t a, uint64_t b, bool add) {                                        \
    HOPPER("{ .reg .pred p; setp.ne.b32 p, " p2 ", 0;\n"                                                            \
           "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." name "." name " {" D_##R "}, " p0 ", " p1              \
           ", p, 1, 1, " p3 ", " p4 "; }"                                                                           \
           : R_##R(0) : "l"(a), "l"(b), "r"((int)add), "n"((int)A), "n"((int)B));                                   \
  }                                                                                                                 \
  template <Major B>                                                                                                \
  DEVICE void multiply(T, float (&d)[R], const uint32_t (&a)[4], uint64_t b, bool add) {                            \
    HOPPER("{ .reg .pred p; setp.ne.b32 p, " p5 ", 0;\n"                                                            \
           "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." name "." name " {" D_##R "}, {" p0 ", " p1 ", " p2     \
           ", " p3 "}, " p4 ", p, 1, 1, " p6 "; }"                                                                  \
           : R_##R(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add), "n"((int)B));            \
  }
#define PRODUCTS(N, R, ...) PRODUCT(BFloat16, "bf16", N, R, __VA_ARGS__) PRODUCT(Half, "f16", N, R, __VA_ARGS__)
PRODUCTS(16, 8, "%8", "%9", "%10", "%11", "%12", "%13", "%14")
PRODUCTS(32, 16, "%16", "%17", "%18", "%19", "%20", "%21", "%22")
PRODUCTS(64, 32, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
PRODUCTS(128, 64, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
#undef PRODUCTS
#undef PRODUCT

// ---- Warps and their registers

// Registers of a thread move between warpgroups; all of a warpgroup's threads ask for the same.
template <int REGISTERS>
DEVICE void take_registers() { HOPPER("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }
template <int REGISTERS>
DEVICE void give_registers() { HOPPER("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }

// Barrier 1 to 15 (0 is __syncthreads) for some threads, a multiple of 32; only `meet` waits.
DEVICE void meet(int barrier, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory"); }
DEVICE void report(int barrier, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory"); }

// True in exactly one thread of a whole warp; in which one is not said.
DEVICE bool elected() {
  uint32_t one = 0;
  HOPPER("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(one));
  return one;
}

// ---- Matrices of 8 x 8 16-bit numbers, four at a time

// Lane l names row l % 8 of matrix l / 8, and holds row l / 4, columns 2 (l % 4) and the next of each.
DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
DEVICE void load_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
DEVICE void store_matrices(void* row, const uint32_t (&r)[4]) {
  HOPPER("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(r[0]),
         "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}

// d [16, 8] += a [16, 16] b [16, 8] of a warp, in the fragments of the section "mma.m16n8k16".
DEVICE void multiply_warp(BFloat16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : R_4(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void multiply_warp(Half, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : R_4(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- Copies of 16 bytes into shared memory, which a thread waits for; of the source only `bytes`, and zeros

DEVICE void copy_16(void* to, const void* from, int bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
DEVICE void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

// ---- Arithmetic

DEVICE float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two numbers rounded to nearest, the first in the lower half.
DEVICE uint32_t pack(BFloat16, float first, float second) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}
DEVICE uint32_t pack(Half, float first, float second) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}
DEVICE float widen(BFloat16 x) { return __uint_as_float((uint32_t)x.bits << 16); }
DEVICE float widen(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

#endif

}  // namespace bertfast::cuda
