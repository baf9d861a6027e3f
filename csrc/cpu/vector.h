// A register of numbers, as wide as the instruction set has them. This is the only file with instructions in it: all
// else is written in the compiler's vector types, and is right in any width.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../tensors.h"

// Products of bf16 pairs: the instruction's, or in a test's build what stands for it.
#if defined(__AVX512BF16__) && !defined(BERTFAST_PAIRS)
#define BERTFAST_PAIRS
#endif

// Registers of 256 bits and their instructions, for what gcc makes too much of; not where a test widens them.
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(BERTFAST_LANES)
#define BERTFAST_AVX2
#endif

#define INLINE [[gnu::always_inline]] static inline
#define UNROLL _Pragma("GCC unroll 16")

namespace bertfast::BERTFAST_SET {

#if defined(BERTFAST_LANES)
constexpr int LANES = BERTFAST_LANES;
#elif defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

#if defined(__aarch64__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = LANES == 16 ? 32 : 16;
#endif

constexpr float LOG2_E = 1.44269504f;

using Floats = float __attribute__((vector_size(4 * LANES)));
using Ints = int32_t __attribute__((vector_size(4 * LANES)));
using Words = uint32_t __attribute__((vector_size(4 * LANES)));
using Longs = uint64_t __attribute__((vector_size(4 * LANES)));
using Halves = uint16_t __attribute__((vector_size(2 * LANES)));
using Bytes = uint8_t __attribute__((vector_size(LANES)));

INLINE Floats splat(float x) { return x - Floats{}; }
INLINE Words splat(uint32_t x) { return x - Words{}; }

INLINE Words lane_numbers() {
  Words lanes;
  for (int i = 0; i < LANES; ++i) lanes[i] = i;
  return lanes;
}

// What gcc makes of __builtin_convertvector takes several times the instructions where a vector is less than 16 bytes or
// more than a register; hence the intrinsics here.
INLINE Floats widen(Halves x) {
#if defined(BERTFAST_AVX2)
  return (Floats)(_mm256_cvtepu16_epi32((__m128i)x) << 16);
#else
  return (Floats)(__builtin_convertvector(x, Words) << 16);
#endif
}

// To the nearest bf16, ties to even; a NaN stays one.
INLINE Halves narrow(Floats x) {
#if defined(__AVX512BF16__)
  return (Halves)_mm512_cvtneps_pbh(x);
#else
  const Words bits = (Words)x, rounded = bits + (((bits >> 16) & 1) + 0x7fff);
  const Words result = (rounded | (Words)(x != x)) >> 16;
#if defined(BERTFAST_AVX2)
  return (Halves)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)result), _mm256_extracti128_si256((__m256i)result, 1));
#else
  return __builtin_convertvector(result, Halves);
#endif
#endif
}

INLINE Floats load(const float* p) {
  Floats x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

INLINE Floats load(const BFloat16* p) {
  Halves x;
  std::memcpy(&x, p, sizeof x);
  return widen(x);
}

INLINE Words load(const uint32_t* p) {
  Words x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

INLINE Words load_words(const uint16_t* p) {
  Halves x;
  std::memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, Words);
}

INLINE void store(uint32_t* p, Words x) { std::memcpy(p, &x, sizeof x); }
INLINE void store(float* p, Floats x) { std::memcpy(p, &x, sizeof x); }

INLINE void store(BFloat16* p, Floats x) {
  const Halves rounded = narrow(x);
  std::memcpy(p, &rounded, sizeof rounded);
}

// Copies `count` < LANES elements, without the call that a size unknown to the compiler would be.
template <class T>
INLINE void copy_some(T* to, const T* from, int count) {
  int64_t done = 0;
  UNROLL for (int size = LANES / 2; size > 0; size /= 2) {
    if (!(count & size)) continue;
    std::memcpy(to + done, from + done, size * sizeof(T));
    done += size;
  }
}

INLINE Ints load(const uint8_t* p) {
#if defined(BERTFAST_AVX2)
  return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  Bytes x;
  std::memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, Ints);
#endif
}

// The first `count` < LANES elements; the others are zero.
template <class T>
INLINE Floats load(const T* p, int count) {
  T some[LANES] = {};
  copy_some(some, p, count);
  return load(some);
}

template <class T>
INLINE void store(T* p, Floats x, int count) {
  T some[LANES];
  store(some, x);
  copy_some(p, some, count);
}

// b where either is no number.
INLINE Floats maximum(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(BERTFAST_AVX2)
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
INLINE Floats absolute(Floats x) { return (Floats)((Words)x & 0x7fffffff); }

INLINE float sum(Floats x) {
  float lanes[LANES];
  std::memcpy(lanes, &x, sizeof x);
  UNROLL for (int width = LANES / 2; width > 0; width /= 2)
    UNROLL for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

INLINE float largest(Floats x) {
  float lanes[LANES];
  std::memcpy(lanes, &x, sizeof x);
  UNROLL for (int width = LANES / 2; width > 0; width /= 2)
    UNROLL for (int i = 0; i < width; ++i) lanes[i] = lanes[i + width] > lanes[i] ? lanes[i + width] : lanes[i];
  return lanes[0];
}

// 2^x for x < 128 to one unit in the last place, 0 below 2^-127; NaN stays NaN.
INLINE Floats exp2(Floats x) {
  const Floats magic = splat(12583039.f);  // 1.5 · 2^23 + 127: adding it rounds to an integer and biases the exponent
  const Floats bounded = maximum(splat(-127.f), x);
  const Floats biased = bounded + magic, f = bounded - (biased - magic);
  Floats p = splat(1.5345812e-4f);  // of 2^f on [-1/2, 1/2], with the least relative error
  p = p * f + 1.3399931e-3f;
  p = p * f + 9.6184891e-3f;
  p = p * f + 5.5503286e-2f;
  p = p * f + 2.4022646e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.f;
  return p * (Floats)((Words)biased << 23);
}

// log2 of a normal x > 0.
INLINE Floats log2(Floats x) {
  // x = 2^e m with m within sqrt(1/2) … sqrt(2); log2 m = 2 / ln 2 · artanh(s), s = (m - 1) / (m + 1).
  const Words bits = (Words)x, shifted = bits - 0x3f3504f3;
  const Ints exponent = (Ints)shifted >> 23;
  const Floats m = (Floats)(bits - ((Words)exponent << 23));
  const Floats s = (m - 1.f) / (m + 1.f), q = s * s;
  Floats p = splat(0.340738331f);
  p = p * q + 0.411672219f;
  p = p * q + 0.577083594f;
  p = p * q + 0.961796673f;
  p = p * q + 2.88539008f;
  return p * s + __builtin_convertvector(exponent, Floats);
}

// Pairs of bf16, the first of each in the lower half.
INLINE Words join(Floats first, Floats second) {
#if defined(__AVX512BF16__)
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  const Words lanes = lane_numbers();
  return (Words)_mm512_permutexvar_epi16((__m512i)(lanes | ((lanes + 16) << 16)), both);
#else
  return __builtin_convertvector(narrow(first), Words) | (__builtin_convertvector(narrow(second), Words) << 16);
#endif
}

// sum + the products of the pairs' first and second numbers.
INLINE Floats dot_pairs(Floats sum, Words a, Words b) {
#if defined(__AVX512BF16__)
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  const Words high = splat(0xffff0000u);
  sum += (Floats)(a & high) * (Floats)(b & high);
  return sum + (Floats)(a << 16) * (Floats)(b << 16);
#endif
}

template <int DISTANCE, int... LANE>
INLINE void exchange(Words& a, Words& b, std::integer_sequence<int, LANE...>) {
  const Words x = a, y = b;
  a = __builtin_shufflevector(x, y, (LANE & DISTANCE ? LANES + LANE - DISTANCE : LANE)...);
  b = __builtin_shufflevector(x, y, (LANE & DISTANCE ? LANES + LANE : LANE + DISTANCE)...);
}

// Lane j of row i becomes lane i of row j.
template <int DISTANCE = LANES / 2>
INLINE void transpose(Words rows[LANES]) {
  UNROLL for (int i = 0; i < LANES; ++i)
    if (!(i & DISTANCE))
      exchange<DISTANCE>(rows[i], rows[i + DISTANCE], std::make_integer_sequence<int, LANES>{});
  if constexpr (DISTANCE > 1) transpose<DISTANCE / 2>(rows);
}

// Philox4x32-10 (Salmon et al., 2011), CALLS in each lane; see bertfast/ops/dropout.py. calls[i] are the four words of the
// counters, and then of the numbers, in the lanes' lower halves; the upper ones hold anything.
template <int CALLS>
INLINE void philox(Longs (&calls)[CALLS][4], uint64_t seed) {
  const auto product = [](Longs x, uint32_t factor) -> Longs {  // of the lower halves
#if defined(__AVX512F__)
    return (Longs)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(factor));
#elif defined(BERTFAST_AVX2)
    return (Longs)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(factor));
#else
    return (x & 0xffffffff) * factor;
#endif
  };
  uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
  UNROLL for (int round = 0; round < 10; ++round) {
    UNROLL for (int i = 0; i < CALLS; ++i) {
      Longs* const c = calls[i];
      const Longs a = product(c[0], 0xD2511F53), b = product(c[2], 0xCD9E8D57);
      c[0] = (b >> 32) ^ (c[1] ^ key0);
      c[1] = b;
      c[2] = (a >> 32) ^ (c[3] ^ key1);
      c[3] = a;
    }
    key0 += 0x9E3779B9, key1 += 0xBB67AE85;
  }
}

// The same of the counters (c0, c1, c2, c3), one in each of LANES lanes.
INLINE void philox(Words c0, Words c1, uint32_t c2, uint32_t c3, uint64_t seed, Words out[4]) {
  const Longs even0 = (Longs)c0, even1 = (Longs)c1;
  Longs calls[2][4] = {{even0, even1, c2 - Longs{}, c3 - Longs{}},
                       {even0 >> 32, even1 >> 32, c2 - Longs{}, c3 - Longs{}}};
  philox(calls, seed);
  UNROLL for (int i = 0; i < 4; ++i) out[i] = (Words)((calls[0][i] & 0xffffffff) | (calls[1][i] << 32));
}

// The order in which store_calls writes the lanes of a Longs, so that it takes no more than instructions that stay
// within 16 bytes.
INLINE Longs call_numbers() {
  Longs numbers;
  for (int i = 0; i < LANES / 2; ++i) numbers[i] = i / 2 + i % 2 * (LANES / 4);
  return numbers;
}

// Writes the words of each lane, 16 bytes, one lane after another in the order of call_numbers.
INLINE void store_calls(uint8_t* p, const Longs call[4]) {
  const Longs low = (call[0] & 0xffffffff) | (call[1] << 32), high = (call[2] & 0xffffffff) | (call[3] << 32);
  Longs even, odd;  // the lanes' numbers in (low, high)
  for (int i = 0; i < LANES / 2; i += 2)
    even[i] = i, even[i + 1] = LANES / 2 + i, odd[i] = i + 1, odd[i + 1] = LANES / 2 + i + 1;
  const Longs first = __builtin_shuffle(low, high, even), second = __builtin_shuffle(low, high, odd);
  std::memcpy(p, &first, sizeof first);
  std::memcpy(p + sizeof first, &second, sizeof second);
}

}  // namespace bertfast::BERTFAST_SET
