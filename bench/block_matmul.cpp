// Multiply blocks of 64³ that stay in the cache of a core: the rate bounds attention. See `ceilings.block_throughput`.
#define BERTFAST_SET native
#include "../csrc/cpu/block_matmul.h"

using namespace bertfast::native;

template <class F>
static void multiply(int times) {
  constexpr int SIZE = 64, DEPTH = SIZE / ELEMENTS<F>;
  alignas(64) static F a[SIZE * DEPTH], b[DEPTH * SIZE];
  alignas(64) static float c[SIZE * SIZE];
  for (int i = 0; i < times; ++i) matmul<DEPTH, 1, SIZE>(a, b, DEPTH, c, SIZE, SIZE / LANES, {false});
}

extern "C" void multiply_blocks(bool bf16, int times) {
  if (bf16) multiply<Operand<bertfast::BFloat16>>(times);
  else multiply<Operand<float>>(times);
}
