// PTX instructions as functions: mbarriers, TMA, wgmma, mma, named barriers, ldmatrix and stmatrix. Only this file and
// arithmetic.cuh, which it includes, have inline assembly.
//
// Kernels include this file and no CUDA header. nvcc compiles the assembly; any other C++20 compiler takes the same
// names from `emulation.h` of tests/emulation, which runs them on a CPU. Instructions of sm_90a trap on other
// architectures, so that one source compiles for all of them. Section names are those of NVIDIA's PTX ISA.
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

// The shared-memory swizzle: 16-byte chunks are permuted within spans of 32, 64 or 128 bytes, to avoid bank conflicts.
enum class Swizzle { none, span32, span64, span128 };

// The contiguous dimension of an operand in memory: K, or M (N), in which case it is read transposed.
enum class Major { k, mn };

// 16 bytes, the widest access of one instruction.
struct alignas(16) Words4 {
  uint32_t word[4];
};

}  // namespace bertfast::cuda

#define DEVICE __device__ __forceinline__
#define UNROLL_FOR _Pragma("unroll") for
#define ROLLED_FOR _Pragma("unroll 1") for  // to save registers
#define UNROLL_4_FOR _Pragma("unroll 4") for  // so that several loads are in flight

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

// XOR the index of a 16-byte chunk (address bits from 4 on) with the index of its 128-byte line (bits 7 to 9).
__host__ __device__ constexpr uint32_t swizzled(uint32_t address, Swizzle swizzle) {
  return address ^ ((address >> 3) & (uint32_t)(span_of(swizzle) - 16));
}

// ROWS x COLUMNS 16-bit elements in the layout that wgmma reads and TMA writes: panels as wide as the swizzle span,
// each holding its columns of row 0, row 1, …. One TMA box {PANEL, ROWS} writes one panel. Tiles are aligned to 1024
// bytes, since the swizzle is a function of the address.
template <int ROWS, int COLUMNS, Swizzle SWIZZLE = (COLUMNS >= 64 ? Swizzle::span128 : Swizzle::span64)>
struct Tile {
  static constexpr Swizzle swizzle = SWIZZLE;
  static constexpr int SPAN = span_of(SWIZZLE), PANEL = SPAN / 2, PANELS = COLUMNS / PANEL;
  static constexpr int PANEL_BYTES = ROWS * SPAN, BYTES = PANELS * PANEL_BYTES;
  static_assert(ROWS % 8 == 0, "the pattern repeats every 8 rows");
  static_assert(COLUMNS % PANEL == 0, "a tile is made of whole panels");

  alignas(1024) unsigned char bytes[BYTES];

  // The address of an element; the 8 columns from a multiple of 8 on are contiguous.
  DEVICE void* at(int row, int column) {
    return bytes + swizzled(column / PANEL * PANEL_BYTES + row * SPAN + column % PANEL * 2, SWIZZLE);
  }

  // The wgmma descriptor of the slice with K = depth … depth + 15 and M (or N) from `first` on. (Section "Shared Memory
  // Matrix Layout": fields of 14 bits count 16 bytes; start at bit 0, leading offset at 16, stride offset at 32, and
  // the mode of swizzling at 62.)
  template <Major MAJOR>
  DEVICE uint64_t slice(int depth, int first = 0) const {
    constexpr uint32_t rows8 = 8 * SPAN, panel = PANEL_BYTES;
    constexpr bool plain = SWIZZLE == Swizzle::none;
    const int row = MAJOR == Major::k ? first : depth, column = MAJOR == Major::k ? depth : first;
    const uint32_t start = column / PANEL * panel + column % PANEL * 2 + row * SPAN;
    // K-major: 32 bytes of each row, which span two panels only in the plain layout, whose panels are 16 bytes wide.
    // MN-major: 16 rows. The leading and stride offsets are swapped between the plain layout and the swizzled ones.
    if constexpr (MAJOR == Major::k) return descriptor(start, plain ? panel : 16, rows8);
    else return descriptor(start, plain ? rows8 : panel, plain ? panel : rows8);
  }

 private:
  // The start is added to the descriptor of the whole tile, so that all slices of a tile take one register and
  // constants. Shared memory is smaller than 2¹⁸ bytes, so the sum stays within its field.
  DEVICE uint64_t descriptor(uint32_t start, uint32_t leading, uint32_t stride) const {
    constexpr uint32_t mode = SWIZZLE == Swizzle::none ? 0 : 4 - (uint32_t)SWIZZLE;
    const auto field = [](uint32_t count) { return (count & 0x3ffff) >> 4; };
    const uint32_t tile = field(shared_address(bytes)) | field(leading) << 16;
    return (uint64_t)(field(stride) | mode << 30) << 32 | (tile + (start >> 4));
  }
};

// ---- Accumulator fragments: row and column of register d[i] of the calling thread, of the 64 rows of a wgmma

DEVICE int fragment_row(int i) { return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + i / 2 % 2 * 8; }
DEVICE int fragment_column(int i) { return i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2; }

// ---- Tensor maps, on the host

// A tensor of 16-bit elements for TMA: sizes and box in elements, innermost first, `strides` in bytes from the second
// dimension on. Elements out of bounds read as zero.
template <int RANK>
struct TensorShape {
  const void* data;
  uint64_t sizes[RANK], strides[RANK - 1];
  uint32_t box[RANK];
  Swizzle swizzle;
};

#if defined(__CUDACC__)  // the rest of this file; the emulation defines the same functions
// clang-format off: the operands of inline assembly are aligned by hand

// Throw std::runtime_error with CUDA's description of an error.
inline void check(cudaError_t error, const char* when) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(when) + ": " + cudaGetErrorString(error));
}

template <int RANK>
CUtensorMap tensor_map(const TensorShape<RANK>& shape) {
  // Looked up at run time: the library does not link libcuda, and loads on machines without a driver.
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
  check((cudaError_t)result, name);  // driver and runtime share their error codes
  return map;
}

// ---- Launches, on the host

// The number of SMs of the current device.
inline int sm_count() {
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
  check(cudaGetLastError(), "an error of earlier work on this GPU");
  if (blocks == 0) return;
  if (shared_bytes > 48 << 10)  // a larger size must be requested
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), "shared memory");
  kernel<<<blocks, threads, shared_bytes, (cudaStream_t)stream>>>((Parameters)arguments...);
  check(cudaGetLastError(), "the launch failed");
}

// ---- Shared memory

// A static array in shared memory, and the launch's dynamic shared memory as a struct.
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

// Make initialised mbarriers visible to TMA; a __syncthreads must follow before other threads use them.
DEVICE void fence_init() { HOPPER("fence.mbarrier_init.release.cluster;" ::: "memory"); }

DEVICE void arrive(uint64_t* barrier) {
  HOPPER("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrive, and make the phase wait for `bytes` more bytes.
DEVICE void arrive_expecting(uint64_t* barrier, uint32_t bytes) {
  HOPPER("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

// Wait until the phase of this parity has completed. A new barrier is in phase 0: a wait for parity 1 returns at once.
DEVICE void wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done = 0;
  while (!done)
    HOPPER("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
           : "=r"(done) : "r"(shared_address(barrier)), "r"(parity) : "memory");
}

// ---- TMA

// Load the box at these coordinates, issued by one thread; its bytes arrive at `barrier`.
DEVICE void load_box(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y) {
  HOPPER("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
             shared_address(to)), "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y) : "memory");
}
DEVICE void load_box(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y, int z) {
  HOPPER("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
         ::"r"(shared_address(to)), "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z) : "memory");
}

// Store a box. The writers must call fence_proxy and pass a barrier before; commit_stores and wait_stores must follow.
DEVICE void store_box(const CUtensorMap* map, const void* from, int x, int y) {
  HOPPER("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
         "r"(shared_address(from)), "r"(x), "r"(y) : "memory");
}
DEVICE void commit_stores() { HOPPER("cp.async.bulk.commit_group;" ::: "memory"); }

// Wait until at most PENDING of this thread's store groups still read shared memory.
template <int PENDING>
DEVICE void wait_stores() { HOPPER("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory"); }

// Order this thread's writes to shared memory before later accesses by wgmma and TMA.
DEVICE void fence_proxy() { HOPPER("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- wgmma

// Keep values in their registers: the compiler does not know that wgmma accesses them asynchronously.
template <int R>
DEVICE void keep_in_registers(float (&d)[R]) {
  UNROLL_FOR (int i = 0; i < R; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int R>
DEVICE void keep_in_registers(uint32_t (&d)[R]) {
  UNROLL_FOR (int i = 0; i < R; ++i) asm volatile("" : "+r"(d[i]));
}

// Required before the first wgmma, and after each ordinary access to accumulators or to A operands in registers.
template <int... R>
DEVICE void fence_wgmma(float (&... d)[R]) {
  (keep_in_registers(d), ...);
  HOPPER("wgmma.fence.sync.aligned;" ::: "memory");
}

DEVICE void commit_wgmma() { HOPPER("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Wait until at most PENDING groups are in flight. `d` are the accumulators that are used next.
template <int PENDING, int... R>
DEVICE void wait_wgmma(float (&... d)[R]) {
  HOPPER("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
  (keep_in_registers(d), ...);
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
// overload for each type and N, since the operands after the accumulators are numbered p0 to p6 from there on. ("1, 1"
// are the signs of a and b.)
#define WGMMA(T, name, N, R, p0, p1, p2, p3, p4, p5, p6)                                                          \
  template <Major A, Major B>                                                                                       \
  DEVICE void wgmma(T, float (&d)[R], uint64_t a, uint64_t b, bool add) {                                        \
    HOPPER("{ .reg .pred p; setp.ne.b32 p, " p2 ", 0;\n"                                                            \
           "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." name "." name " {" D_##R "}, " p0 ", " p1              \
           ", p, 1, 1, " p3 ", " p4 "; }"                                                                           \
           : R_##R(0) : "l"(a), "l"(b), "r"((int)add), "n"((int)A), "n"((int)B));                                   \
  }                                                                                                                 \
  template <Major B>                                                                                                \
  DEVICE void wgmma(T, float (&d)[R], const uint32_t (&a)[4], uint64_t b, bool add) {                            \
    HOPPER("{ .reg .pred p; setp.ne.b32 p, " p5 ", 0;\n"                                                            \
           "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." name "." name " {" D_##R "}, {" p0 ", " p1 ", " p2     \
           ", " p3 "}, " p4 ", p, 1, 1, " p6 "; }"                                                                  \
           : R_##R(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add), "n"((int)B));            \
  }
#define WGMMAS(N, R, ...) WGMMA(BFloat16, "bf16", N, R, __VA_ARGS__) WGMMA(Half, "f16", N, R, __VA_ARGS__)
WGMMAS(16, 8, "%8", "%9", "%10", "%11", "%12", "%13", "%14")
WGMMAS(32, 16, "%16", "%17", "%18", "%19", "%20", "%21", "%22")
WGMMAS(64, 32, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
WGMMAS(128, 64, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
#undef WGMMAS
#undef WGMMA

// ---- Warps and their registers

// Move registers between warpgroups; all threads of a warpgroup must request the same number.
template <int REGISTERS>
DEVICE void setmaxnreg_inc() { HOPPER("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }
template <int REGISTERS>
DEVICE void setmaxnreg_dec() { HOPPER("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }

// Named barrier 1 to 15 (0 is __syncthreads) of `threads` threads, a multiple of 32. `arrive` does not wait. The number
// is a constant because for one in a register a block would reserve all 16 barriers, of the 64 of an SM.
template <int BARRIER>
DEVICE void named_barrier_sync(int threads) {
  asm volatile("bar.sync %0, %1;" ::"n"(BARRIER), "r"(threads) : "memory");
}
template <int BARRIER>
DEVICE void named_barrier_arrive(int threads) {
  asm volatile("bar.arrive %0, %1;" ::"n"(BARRIER), "r"(threads) : "memory");
}

// True in exactly one thread of a full warp; which one is unspecified.
DEVICE bool elect_one() {
  uint32_t one = 0;
  HOPPER("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(one));
  return one;
}

// ---- ldmatrix and stmatrix: four 8 x 8 matrices of 16-bit elements

// Lane l passes the address of row l % 8 of matrix l / 8; r[i] holds row l / 4, columns 2 (l % 4) and 2 (l % 4) + 1 of
// matrix i.
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
DEVICE void mma(BFloat16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : R_4(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void mma(Half, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : R_4(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- cp.async: copy 16 bytes into shared memory; only `bytes` are read from the source, the rest is zero

DEVICE void copy_16(void* to, const void* from, int bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
DEVICE void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

// clang-format on
#endif

}  // namespace bertfast::cuda

#if defined(__CUDACC__)
#include "arithmetic.cuh"
#endif
