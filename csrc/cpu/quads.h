// Dot products of four uint8 of a token and four int8 of a weight, summed exactly in int32.
#pragma once
#include "vector.h"

namespace bertfast::BERTFAST_SET {

// INSTRUCTION: the CPU's own dot product is used.
template <bool INSTRUCTION>
struct Quad {
  uint32_t bits;
};
template <class F>
constexpr bool IS_QUAD = false;
template <bool INSTRUCTION>
constexpr bool IS_QUAD<Quad<INSTRUCTION>> = true;

template <bool INSTRUCTION>
INLINE Words load_operands(const Quad<INSTRUCTION>* p) {
  return load((const uint32_t*)p);
}

// The instruction is written as assembly, because a function that the compiler may use it in could not be compiled
// together with those for CPUs without it.
INLINE Ints multiply_add(Ints sum, Quad<true> factor, Words b) {
  const Words a = splat(factor.bits);
#if defined(BERTFAST_LANES)
  (void)a, (void)b;
#elif defined(__AVX512F__)
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#elif defined(__AVX2__)
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
#else
  (void)a, (void)b;
#endif
  return sum;
}

INLINE Ints multiply_add(Ints sum, Quad<false> factor, Words b) {
  const Words a = splat(factor.bits);
#if defined(BERTFAST_HALVES)
  const Words even = a & 0x00ff00ff, odd = (a >> 8) & 0x00ff00ff;
  return sum + dot_halves(even, (Words)((Shorts)b << 8 >> 8)) + dot_halves(odd, (Words)((Shorts)b >> 8));
#else
  UNROLL_FOR (int bit = 0; bit < 32; bit += 8) sum += (Ints)((a >> bit) & 0xff) * ((Ints)(b << (24 - bit)) >> 24);
  return sum;
#endif
}

}  // namespace bertfast::BERTFAST_SET
