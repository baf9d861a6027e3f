// PTX instructions of arithmetic as functions, for nvcc; hopper.cuh includes this file.
#pragma once

namespace bertfast::cuda {
// clang-format off: the operands of inline assembly are aligned by hand

DEVICE float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2 of x, to 2^-22.
DEVICE float fast_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x, to 1 ulp.
DEVICE float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / sqrt(x), to 2 ulp.
DEVICE float fast_rsqrt(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two 16-bit masks, all ones where the highest bit of byte `byte` of x is set (lower half), and that of the next byte.
DEVICE uint32_t sign_masks(uint32_t x, int byte) {
  uint32_t masks;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(masks) : "r"(x), "r"(0x0011 * (8 + byte) + 0x1100 * (9 + byte)));
  return masks;
}

// Round two values to nearest and pack them, the first in the lower half.
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

// clang-format on
}  // namespace bertfast::cuda
