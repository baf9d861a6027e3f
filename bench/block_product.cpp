// How fast one core multiplies blocks of 64³ that lie in its cache: what bounds attention. See `harness.block_rate`.
#define BERTFAST_SET native
#include "../csrc/cpu/attention_blocks.h"

using namespace bertfast::native;

template <class T, class E>
static void multiply_blocks(int times) {
  constexpr int DEPTH = BLOCK / ELEMENTS<E>;
  alignas(64) static E a[BLOCK * DEPTH], b[DEPTH * BLOCK];
  alignas(64) static float c[BLOCK * BLOCK];
  for (int i = 0; i < times; ++i)
    multiply<E, Start::sum>(Strided<E>{a, DEPTH, 1}, BLOCK, DEPTH, b, BLOCK, BLOCK, c, BLOCK);
}

extern "C" void multiply_blocks(bool bf16, int times) {
  with_elements(bf16 ? bertfast::Type::bfloat16 : bertfast::Type::float32,
                [&]<class T, class E>(T, E) { multiply_blocks<T, E>(times); });
}
