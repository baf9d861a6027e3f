// Small kernels that show what the emulation assumes: one product in every layout of its operands, boxes that reach out
// of a tensor, moves of matrices, barriers of some of a block's threads. What they compute is known beforehand, and on a
// GPU it must be the same.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "hopper.cuh"

namespace py = pybind11;
using namespace bertfast::cuda;
using bertfast::BFloat16, bertfast::Half;

constexpr int DEPTH = 64;

using Bits = py::array_t<uint16_t, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style>;
using Ints = py::array_t<int, py::array::c_style>;

// The numbers of an array where a kernel reaches them: on a GPU a copy, which goes back when this ends.
template <class T>
struct InReach {
#if defined(__CUDACC__)
  explicit InReach(const py::array_t<T, py::array::c_style>& array) : host((T*)array.data()), bytes(array.nbytes()) {
    if (cudaMalloc(&data, bytes) != cudaSuccess) throw std::bad_alloc();
    cudaMemcpy(data, host, bytes, cudaMemcpyDefault);
  }
  ~InReach() {
    cudaMemcpy(host, data, bytes, cudaMemcpyDefault);  // once the kernel is done
    cudaFree(data);
  }
  InReach(const InReach&) = delete;
  T* host;
  size_t bytes;
#else
  explicit InReach(const py::array_t<T, py::array::c_style>& array) : data((T*)array.data()) {}
#endif
  T* data = nullptr;
};

// ---- d [64, N] = a b, each operand as it is or transposed in memory

template <int N, Swizzle SWIZZLE, Major A, Major B>
struct Operands {
  static constexpr int A_ROWS = 64, B_ROWS = B == Major::k ? N : DEPTH, B_COLUMNS = B == Major::k ? DEPTH : N;
  Tile<A_ROWS, 64, SWIZZLE> a;
  Tile<B_ROWS, B_COLUMNS, SWIZZLE> b;
  uint64_t full;
};

template <class Loaded>
DEVICE void load_panels(Loaded& tile, const CUtensorMap* map, uint64_t* barrier) {
  for (int panel = 0; panel < Loaded::PANELS; ++panel)
    load_box(tile.bytes + panel * Loaded::PANEL_BYTES, map, barrier, panel * Loaded::PANEL, 0);
}

template <class T, int N, Swizzle SWIZZLE, Major A, Major B, bool IN_REGISTERS>
__global__ void __launch_bounds__(128)
    multiply_kernel(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b, float* d) {
  using Memory = Operands<N, SWIZZLE, A, B>;
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
  fence_products(result);
  UNROLL for (int depth = 0; depth < DEPTH; depth += 16) {
    if constexpr (IN_REGISTERS) {
      uint32_t fragment[4];
      UNROLL for (int i = 0; i < 4; ++i)
        memcpy(&fragment[i], memory.a.at(fragment_row(2 * i), depth + fragment_column(2 * i)), 4);
      multiply<B>(T{}, result, fragment, memory.b.template slice<B>(depth), depth > 0);
    } else {
      multiply<A, B>(T{}, result, memory.a.template slice<A>(depth), memory.b.template slice<B>(depth), depth > 0);
    }
  }
  commit_products();
  wait_products<0>(result);
  UNROLL for (int i = 0; i < N / 2; ++i) d[fragment_row(i) * N + fragment_column(i)] = result[i];
}

template <class T, int N, Swizzle SWIZZLE, Major A, Major B, bool IN_REGISTERS = false>
Floats multiply_tiles(const Bits& a, const Bits& b) {
  using Memory = Operands<N, SWIZZLE, A, B>;
  Floats d({64, N});
  const InReach a_there(a), b_there(b);
  const InReach d_there(d);
  const auto map = [](const uint16_t* x, int rows, int columns, int panel) {
    return tensor_map<2>({x, {(uint64_t)columns, (uint64_t)rows}, {(uint64_t)columns * 2},
                          {(uint32_t)panel, (uint32_t)rows}, SWIZZLE});
  };
  launch(multiply_kernel<T, N, SWIZZLE, A, B, IN_REGISTERS>, 1, 128, sizeof(Memory), nullptr,
         map(a_there.data, 64, 64, decltype(Memory::a)::PANEL),
         map(b_there.data, Memory::B_ROWS, Memory::B_COLUMNS, decltype(Memory::b)::PANEL), d_there.data);
  return d;
}

template <class T, int N, Swizzle SWIZZLE>
Floats multiply_either(const Bits& a, const Bits& b, bool a_transposed, bool b_transposed) {
  if (a_transposed && b_transposed) return multiply_tiles<T, N, SWIZZLE, Major::mn, Major::mn>(a, b);
  if (a_transposed) return multiply_tiles<T, N, SWIZZLE, Major::mn, Major::k>(a, b);
  if (b_transposed) return multiply_tiles<T, N, SWIZZLE, Major::k, Major::mn>(a, b);
  return multiply_tiles<T, N, SWIZZLE, Major::k, Major::k>(a, b);
}

// ---- A box of [Z, Y, X] numbers from a place on, which may lie outside of them in part

struct BoxMemory {
  alignas(128) uint16_t box[3 * 4 * 8];
  uint64_t full;
};

__global__ void box_kernel(const __grid_constant__ CUtensorMap from, const __grid_constant__ CUtensorMap to, int x, int y,
                           int z) {
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

Bits box(const Bits& x, int column, int row, int plane) {
  Bits result({3, 4, 8});
  const InReach there(x), result_there(result);
  const uint64_t rows = (uint64_t)x.shape(1), columns = (uint64_t)x.shape(2);
  launch(box_kernel, 1, 1, sizeof(BoxMemory), nullptr,
         tensor_map<3>({there.data, {columns, rows, (uint64_t)x.shape(0)}, {columns * 2, rows * columns * 2}, {8, 4, 3},
                        Swizzle::none}),
         tensor_map<2>({result_there.data, {8, 12}, {16}, {8, 12}, Swizzle::none}), column, row, plane);
  return result;
}

// ---- A 16 x 16 matrix transposed: one warp copies it, another, which waits for that alone, turns it

__global__ void transpose_kernel(const uint16_t* x, uint16_t* y) {
  SHARED_ARRAY(uint16_t, tile, 256);
  SHARED_ARRAY(uint16_t, turned, 256);
  const int lane = (int)threadIdx.x % 32, place = lane % 16 * 16 + lane / 16 * 8;
  if (threadIdx.x < 32) {
    copy_16(tile + place, x + place, lane % 16 == 15 ? 0 : 16);  // the last row as zeros
    commit_copies();
    wait_copies<0>();
    report(3, 64);
    return;
  }
  meet(3, 64);
  uint32_t r[4];
  load_transposed(r, tile + place);
  store_matrices(turned + place, {r[0], r[2], r[1], r[3]});
  __syncwarp();
  for (int i = lane; i < 256; i += 32) y[i] = turned[i];
}

Bits transpose(const Bits& x) {
  Bits y({16, 16});
  const InReach there(x), y_there(y);
  launch(transpose_kernel, 1, 64, 0, nullptr, there.data, y_there.data);
  return y;
}

// ---- [16, 16] times [16, 8] by one warp

template <class T>
__global__ void multiply_warp_kernel(const uint16_t* a, const uint16_t* b, float* d) {
  SHARED_ARRAY(uint16_t, tile, 256);
  const int lane = (int)threadIdx.x, place = lane % 16 * 16 + lane / 16 * 8;
  memcpy(tile + place, a + place, 16);
  __syncwarp();
  uint32_t a_pairs[4], b_pairs[2];
  load_matrices(a_pairs, tile + place);
  for (int i = 0; i < 2; ++i) {
    const int row = lane % 4 * 2 + i * 8;
    b_pairs[i] = b[row * 8 + lane / 4] | (uint32_t)b[(row + 1) * 8 + lane / 4] << 16;
  }
  float sums[4] = {};
  multiply_warp(T{}, sums, a_pairs, b_pairs);
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

template <class T>
Floats multiply_in_a_warp(const Bits& a, const Bits& b) {
  Floats d({16, 8});
  const InReach a_there(a), b_there(b);
  const InReach d_there(d);
  launch(multiply_warp_kernel<T>, 1, 32, 0, nullptr, a_there.data, b_there.data, d_there.data);
  return d;
}

// ---- Sums over a block that is no whole number of warps, and the one thread of a warp that is elected

__global__ void count_kernel(int* sums, int* elected_threads) {
  int x = (int)threadIdx.x;
  for (int lanes = 4; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  __syncthreads();
  sums[threadIdx.x] = x;
  if (threadIdx.x < 32 && elected()) *elected_threads += 1;
}

py::tuple count(int threads) {
  Ints sums(threads), elected_threads(1);
  elected_threads.mutable_at(0) = 0;
  {
    const InReach sums_there(sums), elected_there(elected_threads);
    launch(count_kernel, 1, threads, 0, nullptr, sums_there.data, elected_there.data);
  }
  return py::make_tuple(sums, elected_threads.at(0));
}

PYBIND11_MODULE(probes, exported) {
  const auto either = [&](const char* name, auto function) { exported.def(name, function); };
  either("multiply_16_span32", multiply_either<BFloat16, 16, Swizzle::span32>);
  either("multiply_32_span64", multiply_either<BFloat16, 32, Swizzle::span64>);
  either("multiply_64_none", multiply_either<BFloat16, 64, Swizzle::none>);
  either("multiply_64_span128", multiply_either<Half, 64, Swizzle::span128>);
  either("multiply_128_span64", multiply_either<BFloat16, 128, Swizzle::span64>);
  either("multiply_128_span128", multiply_either<BFloat16, 128, Swizzle::span128>);
  exported.def("multiply_from_registers", multiply_tiles<BFloat16, 64, Swizzle::span128, Major::k, Major::mn, true>);
  exported.def("box", box);
  exported.def("transpose", transpose);
  exported.def("multiply_in_a_warp_bf16", multiply_in_a_warp<BFloat16>);
  exported.def("multiply_in_a_warp_fp16", multiply_in_a_warp<Half>);
  exported.def("count", count);
}
