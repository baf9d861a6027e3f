// A matmul as Hopper kernels are written, with an optional planted mistake: c [M, N] = a [M, K] b [N, K]ᵀ.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "hopper.cuh"

namespace py = pybind11;
using namespace bertfast::cuda;
using bertfast::BFloat16;

constexpr int ROWS = 64, COLUMNS = 128, DEPTH = 64, STAGES = 2, THREADS = 256;

enum class Mistake {
  none,
  swizzle_of_descriptor,
  swizzle_of_load,
  parity,
  no_wait_for_load,
  one_warp_waits_for_load,
  no_wait_for_empty_stage,
  no_arrival,
  too_few_bytes,
  no_wgmma_wait,
  no_commit,
  no_wgmma_fence,
  release_before_wait,
  late_wait,
  no_fence_init,
  tile_at_512_bytes,
  wrong_accumulator,
  too_many_registers,
  write_past_shared_memory,
  write_far_past_shared_memory,
  write_past_result,
  no_fence_proxy,
  barrier_thread_count_too_high,
  barrier_overwritten,
};

struct Memory {
  Tile<ROWS, DEPTH> a[STAGES];
  Tile<COLUMNS, DEPTH> b[STAGES];
  uint64_t full[STAGES], empty[STAGES];
};

__global__ void matmul_kernel(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b, float* c,
                              int m, int n, int k, Mistake mistake) {
  const auto is = [&](Mistake other) { return mistake == other; };
  Memory& memory = *(Memory*)((char*)&shared_memory<Memory>() + (is(Mistake::tile_at_512_bytes) ? 512 : 0));
  const int blocks_across = (n + COLUMNS - 1) / COLUMNS;
  const int row = (int)blockIdx.x / blocks_across * ROWS, column = (int)blockIdx.x % blocks_across * COLUMNS;
  const int steps = (k + DEPTH - 1) / DEPTH;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) init(&memory.full[stage], 1), init(&memory.empty[stage], 128);
    if (!is(Mistake::no_fence_init)) fence_init();
    if (is(Mistake::barrier_overwritten)) memory.full[0] = 0;
    if (is(Mistake::write_past_shared_memory)) *(char*)(&memory + 1) = 0;
    if (is(Mistake::write_far_past_shared_memory)) *((char*)(&memory + 1) + 8192) = 0;
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    setmaxnreg_dec<40>();
    if (threadIdx.x < 32 && elect_one())
      for (int step = 0; step < steps; ++step) {
        const int stage = step % STAGES;
        if (!is(Mistake::no_wait_for_empty_stage)) wait(&memory.empty[stage], (step / STAGES + 1) % 2);
        const int bytes = sizeof memory.a[0].bytes + sizeof memory.b[0].bytes;
        arrive_expecting(&memory.full[stage], is(Mistake::too_few_bytes) ? sizeof memory.a[0].bytes : bytes);
        load_box(memory.a[stage].bytes, &a, &memory.full[stage], step * DEPTH, row);
        load_box(memory.b[stage].bytes, &b, &memory.full[stage], step * DEPTH, column);
      }
    return;
  }
  if (is(Mistake::too_many_registers)) setmaxnreg_inc<256>(), current->registers = 512;
  else setmaxnreg_inc<232>();
  float sums[COLUMNS / 2];
  for (int step = 0; step < steps; ++step) {
    const int stage = step % STAGES, parity = step / STAGES % 2;
    const bool waits = !is(Mistake::no_wait_for_load) && (!is(Mistake::one_warp_waits_for_load) || threadIdx.x < 160);
    if (waits) wait(&memory.full[stage], is(Mistake::parity) ? 1 - parity : parity);
    if (is(Mistake::no_fence_proxy)) *(uint16_t*)memory.a[stage].at((int)threadIdx.x % 64, 0) = 0x3f80;
    if (is(Mistake::barrier_thread_count_too_high)) named_barrier_sync<1>(160);
    if (!is(Mistake::no_wgmma_fence)) fence_wgmma(sums);
    for (int depth = 0; depth < DEPTH; depth += 16) {
      const uint64_t a_slice = memory.a[stage].slice<Major::k>(depth);
      const uint64_t right = memory.b[stage].slice<Major::k>(depth);
      using Other = Tile<COLUMNS, DEPTH, Swizzle::span64>;
      const uint64_t wrong = ((Other*)&memory.b[stage])->slice<Major::k>(depth);
      wgmma<Major::k, Major::k>(BFloat16{}, sums, a_slice, is(Mistake::swizzle_of_descriptor) ? wrong : right,
                                step > 0 || depth > 0);
    }
    if (!is(Mistake::no_commit)) commit_wgmma();
    if (is(Mistake::release_before_wait)) arrive(&memory.empty[stage]);
    if (is(Mistake::late_wait)) wait_wgmma<1>(sums);
    else if (!is(Mistake::no_wgmma_wait)) wait_wgmma<0>(sums);
    if (!is(Mistake::release_before_wait) && !is(Mistake::no_arrival)) arrive(&memory.empty[stage]);
  }
  for (int i = 0; i < COLUMNS / 2; ++i) {
    const int y = row + fragment_row(i), x = column + fragment_column(i);
    if ((y < m || is(Mistake::write_past_result)) && x < n)
      c[(int64_t)y * n + x] = sums[is(Mistake::wrong_accumulator) ? i ^ 2 : i];
  }
}

// c is an address: the caller allocates it in front of a guard page, which detects writes past its end.
void matmul_with(Mistake mistake, const py::array_t<uint16_t>& a, const py::array_t<uint16_t>& b, uintptr_t c) {
  const int m = (int)a.shape(0), n = (int)b.shape(0), k = (int)a.shape(1);
  const auto map = [&](const py::array_t<uint16_t>& x, uint32_t rows, Swizzle swizzle) {
    return tensor_map<2>({x.data(),
                          {(uint64_t)k, (uint64_t)x.shape(0)},
                          {(uint64_t)k * 2},
                          {swizzle == Swizzle::span64 ? 32u : 64u, rows},
                          swizzle});
  };
  launch(matmul_kernel, (m + ROWS - 1) / ROWS * ((n + COLUMNS - 1) / COLUMNS), THREADS,
         (int)sizeof(Memory) + (mistake == Mistake::tile_at_512_bytes ? 512 : 0), nullptr,
         map(a, ROWS, Swizzle::span128),
         map(b, COLUMNS, mistake == Mistake::swizzle_of_load ? Swizzle::none : Swizzle::span128), (float*)c, m, n, k,
         mistake);
}

PYBIND11_MODULE(mistakes, module) {
  py::enum_<Mistake> names(module, "Mistake");
#define NAME(name) names.value(#name, Mistake::name)
  NAME(none), NAME(swizzle_of_descriptor), NAME(swizzle_of_load), NAME(parity), NAME(no_wait_for_load);
  NAME(one_warp_waits_for_load), NAME(no_wait_for_empty_stage), NAME(no_arrival), NAME(too_few_bytes);
  NAME(no_wgmma_wait), NAME(no_commit), NAME(no_wgmma_fence), NAME(release_before_wait), NAME(late_wait);
  NAME(no_fence_init), NAME(tile_at_512_bytes), NAME(wrong_accumulator), NAME(too_many_registers);
  NAME(write_past_shared_memory), NAME(write_far_past_shared_memory), NAME(write_past_result);
  NAME(no_fence_proxy), NAME(barrier_thread_count_too_high), NAME(barrier_overwritten);
#undef NAME
  module.def("matmul_with", matmul_with);
}
