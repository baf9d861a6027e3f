// Small kernels that check what the emulation assumes: one wgmma in every layout of its operands that attention uses,
// boxes that exceed a tensor's bounds, ldmatrix and stmatrix, named barriers. What they compute is
// known beforehand, and on a GPU it must be the same.
//
// The functions have C's interface, so that a library which was built ahead of time serves every Python: arrays are
// pointers to host memory, and what is returned is an error's text or null.
#include "hopper.cuh"

using namespace bertfast::cuda;
using bertfast::BFloat16, bertfast::Half;

#define EXPORTED extern "C" __attribute__((visibility("default"))) const char*

// Run f, and return the text of its exception, valid until the next call, or null.
template <class F>
const char* error_of(const F& f) {
  static std::string text;
  try {
    f();
    return nullptr;
  } catch (const std::exception& error) {
    text = error.what();
    return text.c_str();
  }
}

// An array that a kernel can access: on a GPU a copy, which is copied back at the end of its scope.
template <class T>
struct DeviceArray {
#if defined(__CUDACC__)
  DeviceArray(T* host, int64_t count) : host(host), bytes(count * sizeof(T)) {
    check(cudaMalloc(&data, bytes), "memory for a probe");
    check(cudaMemcpy(data, host, bytes, cudaMemcpyDefault), "copying to the GPU");
  }
  ~DeviceArray() noexcept(false) {
    const cudaError_t error = cudaMemcpy(host, data, bytes, cudaMemcpyDefault);  // once the kernel is done
    cudaFree(data);
    if (std::uncaught_exceptions() == 0) check(error, "a probe");
  }
  DeviceArray(const DeviceArray&) = delete;
  T* host;
  size_t bytes;
#else
  DeviceArray(T* host, int64_t) : data(host) {}
#endif
  T* data = nullptr;
};

// ---- d [64, N] = a b, each operand plain or transposed in memory, from an offset in a larger tile

constexpr int DEPTH = 128;
constexpr int A_ROWS = 128;  // of which a wgmma takes 64

template <int B_ROWS, Swizzle SWIZZLE, Major A, Major B>
struct Operands {
  Tile<A == Major::k ? A_ROWS : DEPTH, A == Major::k ? DEPTH : A_ROWS, SWIZZLE> a;
  Tile<B == Major::k ? B_ROWS : DEPTH, B == Major::k ? DEPTH : B_ROWS, SWIZZLE> b;
  uint64_t full;
};

template <class Loaded>
DEVICE void load_panels(Loaded& tile, const CUtensorMap* map, uint64_t* barrier) {
  for (int panel = 0; panel < Loaded::PANELS; ++panel)
    load_box(tile.bytes + panel * Loaded::PANEL_BYTES, map, barrier, panel * Loaded::PANEL, 0);
}

template <class T, int N, class Memory, Major A, Major B, bool IN_REGISTERS>
__global__ void __launch_bounds__(128)
    matmul_kernel(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b, int a_first,
                  int b_first, float* d) {
  Memory& memory = shared_memory<Memory>();
  if (threadIdx.x == 0) {
    init(&memory.full, 1);
    fence_init();
    arrive_expecting(&memory.full, sizeof memory.a.bytes + sizeof memory.b.bytes);
    load_panels(memory.a, &a, &memory.full);
    load_panels(memory.b, &b, &memory.full);
  }
  __syncthreads();
  wait(&memory.full, 0);
  float result[N / 2];
  fence_wgmma(result);
  UNROLL_FOR (int depth = 0; depth < DEPTH; depth += 16) {
    const uint64_t b_slice = memory.b.template slice<B>(depth, b_first);
    if constexpr (IN_REGISTERS) {
      uint32_t fragment[4];
      UNROLL_FOR (int i = 0; i < 4; ++i)
        memcpy(&fragment[i], memory.a.at(a_first + fragment_row(2 * i), depth + fragment_column(2 * i)), 4);
      wgmma<B>(T{}, result, fragment, b_slice, depth > 0);
    } else {
      wgmma<A, B>(T{}, result, memory.a.template slice<A>(depth, a_first), b_slice, depth > 0);
    }
  }
  commit_wgmma();
  wait_wgmma<0>(result);
  UNROLL_FOR (int i = 0; i < N / 2; ++i) d[fragment_row(i) * N + fragment_column(i)] = result[i];
}

// Arguments of a wgmma probe. a is [128, DEPTH] and b [B_ROWS, DEPTH], transposed if set; the wgmma takes the rows of a
// from a_first on (64) and those of b from b_first on (N).
struct MatmulArguments {
  uint16_t *a, *b;
  float* d;  // [64, N]
  int a_first, b_first;
  bool a_transposed, b_transposed;
};

template <class T, int N, int B_ROWS, Swizzle SWIZZLE, Major A, Major B, bool IN_REGISTERS = false>
void matmul_tiles(const MatmulArguments& arguments) {
  using Memory = Operands<B_ROWS, SWIZZLE, A, B>;
  const DeviceArray a(arguments.a, A_ROWS * DEPTH), b(arguments.b, B_ROWS * DEPTH);
  const DeviceArray d(arguments.d, 64 * N);
  const auto map = [](const uint16_t* x, int rows, int columns, int panel) {
    return tensor_map<2>(
        {x, {(uint64_t)columns, (uint64_t)rows}, {(uint64_t)columns * 2}, {(uint32_t)panel, (uint32_t)rows}, SWIZZLE});
  };
  launch(matmul_kernel<T, N, Memory, A, B, IN_REGISTERS>, 1, 128, sizeof(Memory), nullptr,
         map(a.data, A == Major::k ? A_ROWS : DEPTH, A == Major::k ? DEPTH : A_ROWS, decltype(Memory::a)::PANEL),
         map(b.data, B == Major::k ? B_ROWS : DEPTH, B == Major::k ? DEPTH : B_ROWS, decltype(Memory::b)::PANEL),
         arguments.a_first, arguments.b_first, d.data);
}

template <class T, int N, int B_ROWS, Swizzle SWIZZLE>
void matmul_either(const MatmulArguments& arguments) {
  if (arguments.a_transposed && arguments.b_transposed)
    matmul_tiles<T, N, B_ROWS, SWIZZLE, Major::mn, Major::mn>(arguments);
  else if (arguments.a_transposed) matmul_tiles<T, N, B_ROWS, SWIZZLE, Major::mn, Major::k>(arguments);
  else if (arguments.b_transposed) matmul_tiles<T, N, B_ROWS, SWIZZLE, Major::k, Major::mn>(arguments);
  else matmul_tiles<T, N, B_ROWS, SWIZZLE, Major::k, Major::k>(arguments);
}

// Every width of a wgmma, of a tile and of a swizzle's span that attention uses, and the layout without a swizzle.
#define PROBE(name, ...)                                              \
  EXPORTED name(const MatmulArguments* arguments) {                   \
    return error_of([&] { matmul_either<__VA_ARGS__>(*arguments); }); \
  }
PROBE(wgmma_16_of_16_span32, BFloat16, 16, 16, Swizzle::span32)
PROBE(wgmma_16_of_32_span64, BFloat16, 16, 32, Swizzle::span64)
PROBE(wgmma_32_of_32_span64, BFloat16, 32, 32, Swizzle::span64)
PROBE(wgmma_32_of_64_span128, BFloat16, 32, 64, Swizzle::span128)
PROBE(wgmma_64_of_64_none, BFloat16, 64, 64, Swizzle::none)
PROBE(wgmma_64_of_64_span64, BFloat16, 64, 64, Swizzle::span64)
PROBE(wgmma_64_of_64_span128, Half, 64, 64, Swizzle::span128)
PROBE(wgmma_64_of_128_span128, BFloat16, 64, 128, Swizzle::span128)
PROBE(wgmma_128_of_128_span64, BFloat16, 128, 128, Swizzle::span64)
PROBE(wgmma_128_of_128_span128, BFloat16, 128, 128, Swizzle::span128)
#undef PROBE

EXPORTED wgmma_from_registers(const MatmulArguments* arguments) {
  return error_of([&] { matmul_tiles<BFloat16, 64, 64, Swizzle::span128, Major::k, Major::mn, true>(*arguments); });
}

// ---- A box of a tensor [Z, Y, X] at an origin that may be partly out of bounds

struct BoxMemory {
  alignas(128) uint16_t box[3 * 4 * 8];
  uint64_t full;
};

__global__ void box_kernel(const __grid_constant__ CUtensorMap from, const __grid_constant__ CUtensorMap to, int x,
                           int y, int z) {
  BoxMemory& memory = shared_memory<BoxMemory>();
  init(&memory.full, 1);
  fence_init();
  arrive_expecting(&memory.full, sizeof memory.box);
  load_box(memory.box, &from, &memory.full, x, y, z);
  wait(&memory.full, 0);
  store_box(&to, memory.box, 0, 0);
  commit_stores();
  wait_stores<0>();
}

// x [planes, rows, columns] to y [3, 4, 8].
EXPORTED box(uint16_t* x, uint16_t* y, int planes, int rows, int columns, int column, int row, int plane) {
  return error_of([&] {
    const DeviceArray from(x, (int64_t)planes * rows * columns), to(y, 3 * 4 * 8);
    const uint64_t stride = (uint64_t)columns * 2;
    launch(box_kernel, 1, 1, sizeof(BoxMemory), nullptr,
           tensor_map<3>({from.data,
                          {(uint64_t)columns, (uint64_t)rows, (uint64_t)planes},
                          {stride, rows * stride},
                          {8, 4, 3},
                          Swizzle::none}),
           tensor_map<2>({to.data, {8, 12}, {16}, {8, 12}, Swizzle::none}), column, row, plane);
  });
}

// ---- A 16 x 16 transpose: one warp copies the matrix, another waits on a named barrier and transposes it

__global__ void transpose_kernel(const uint16_t* x, uint16_t* y) {
  SHARED_ARRAY(uint16_t, tile, 256);
  SHARED_ARRAY(uint16_t, transposed, 256);
  const int lane = (int)threadIdx.x % 32, offset = lane % 16 * 16 + lane / 16 * 8;
  if (threadIdx.x < 32) {
    copy_16(tile + offset, x + offset, lane % 16 == 15 ? 0 : 16);  // the last row as zeros
    commit_copies();
    wait_copies<0>();
    named_barrier_arrive<3>(64);
    return;
  }
  named_barrier_sync<3>(64);
  uint32_t r[4];
  load_transposed(r, tile + offset);
  store_matrices(transposed + offset, {r[0], r[2], r[1], r[3]});
  __syncwarp();
  for (int i = lane; i < 256; i += 32) y[i] = transposed[i];
}

EXPORTED transpose(uint16_t* x, uint16_t* y) {
  return error_of([&] {
    const DeviceArray from(x, 256), to(y, 256);
    launch(transpose_kernel, 1, 64, 0, nullptr, from.data, to.data);
  });
}

// ---- [16, 16] times [16, 8] by one warp

template <class T>
__global__ void mma_kernel(const uint16_t* a, const uint16_t* b, float* d) {
  SHARED_ARRAY(uint16_t, tile, 256);
  const int lane = (int)threadIdx.x, offset = lane % 16 * 16 + lane / 16 * 8;
  memcpy(tile + offset, a + offset, 16);
  __syncwarp();
  uint32_t a_pairs[4], b_pairs[2];
  load_matrices(a_pairs, tile + offset);
  for (int i = 0; i < 2; ++i) {
    const int row = lane % 4 * 2 + i * 8;
    b_pairs[i] = b[row * 8 + lane / 4] | (uint32_t)b[(row + 1) * 8 + lane / 4] << 16;
  }
  float sums[4] = {};
  mma(T{}, sums, a_pairs, b_pairs);
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

template <class T>
const char* run_mma(uint16_t* a, uint16_t* b, float* d) {
  return error_of([&] {
    const DeviceArray a_device(a, 16 * 16), b_device(b, 16 * 8);
    const DeviceArray d_device(d, 16 * 8);
    launch(mma_kernel<T>, 1, 32, 0, nullptr, a_device.data, b_device.data, d_device.data);
  });
}
EXPORTED mma_bf16(uint16_t* a, uint16_t* b, float* d) { return run_mma<BFloat16>(a, b, d); }
EXPORTED mma_fp16(uint16_t* a, uint16_t* b, float* d) { return run_mma<Half>(a, b, d); }

// ---- Sums over a block that is no whole number of warps, and the one thread of a warp that elect_one chooses

__global__ void count_kernel(int* sums, int* elected_threads) {
  int x = (int)threadIdx.x;
  for (int lanes = 4; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  __syncthreads();
  sums[threadIdx.x] = x;
  if (threadIdx.x < 32 && elect_one()) *elected_threads += 1;
}

// sums [threads], elected_threads [1].
EXPORTED count(int threads, int* sums, int* elected_threads) {
  return error_of([&] {
    const DeviceArray sums_device(sums, threads), elected_device(elected_threads, 1);
    launch(count_kernel, 1, threads, 0, nullptr, sums_device.data, elected_device.data);
  });
}
