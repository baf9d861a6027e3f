// A SIMD register of the instruction set's width. Intrinsics are in this file only: everything else uses the compiler's
// vector types and works at any width.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // of gcc 12 about its own intrinsics
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "../tensors.h"

// bf16 dot products: by the instruction, or emulated in a test build.
#if defined(__AVX512BF16__) && !defined(BERTFAST_PAIRS)
#define BERTFAST_PAIRS
#endif

// AVX2 intrinsics for what gcc compiles badly; not in test builds that emulate wider registers.
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(BERTFAST_LANES)
#define BERTFAST_AVX2
#endif

// Dot products of pairs of int16 by the instruction.
#if defined(__AVX512BW__) || defined(BERTFAST_AVX2)
#define BERTFAST_HALVES
#endif

#define INLINE [[gnu::always_inline]] static inline
#define UNROLL_FOR _Pragma("GCC unroll 16") for

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
using Shorts = int16_t __attribute__((vector_size(4 * LANES)));
using Halves = uint16_t __attribute__((vector_size(2 * LANES)));
using Bytes = uint8_t __attribute__((vector_size(LANES)));

INLINE Floats splat(float x) { return x - Floats{}; }
INLINE Words splat(uint32_t x) { return x - Words{}; }

INLINE Words lane_ids() {
  Words lanes;
  for (int i = 0; i < LANES; ++i) lanes[i] = i;
  return lanes;
}

// gcc's code for __builtin_convertvector takes several times the instructions where the sizes of the elements differ;
// hence the intrinsics here.
INLINE Words to_words(Halves x) {
#if defined(__AVX512F__)
  return (Words)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(BERTFAST_AVX2)
  return (Words)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, Words);
#endif
}

INLINE Floats widen(Halves x) { return (Floats)(to_words(x) << 16); }

// The bits of x, whose upper halves are rounded to the nearest bf16, ties to even; NaN stays NaN.
INLINE Words rounded_to_bf16(Floats x) {
  const Words bits = (Words)x;
  return (bits + (((bits >> 16) & 1) + 0x7fff)) | (Words)(x != x);
}

INLINE Halves narrow(Floats x) {
#if defined(__AVX512BF16__)
  return (Halves)_mm512_cvtneps_pbh(x);
#else
  const Words result = rounded_to_bf16(x) >> 16;
#if defined(BERTFAST_AVX2)
  return (Halves)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)result),
                                  _mm256_extracti128_si256((__m256i)result, 1));
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

// The value that a register has after it was stored as T.
template <class T>
INLINE Floats as_stored(Floats x) {
  if constexpr (sizeof(T) == sizeof(float)) return x;
  else return widen(narrow(x));
}

INLINE Words load_words(const uint16_t* p) {
  Halves x;
  std::memcpy(&x, p, sizeof x);
  return to_words(x);
}

INLINE void store(uint32_t* p, Words x) { std::memcpy(p, &x, sizeof x); }
INLINE void store(float* p, Floats x) { std::memcpy(p, &x, sizeof x); }

INLINE void store(BFloat16* p, Floats x) {
  const Halves rounded = narrow(x);
  std::memcpy(p, &rounded, sizeof rounded);
}

// Copy `count` < LANES elements, by powers of two: memcpy of a size unknown to the compiler would be a call.
template <class T>
INLINE void copy_partial(T* to, const T* from, int count) {
  int64_t done = 0;
  UNROLL_FOR (int size = LANES / 2; size > 0; size /= 2) {
    if (!(count & size)) continue;
    std::memcpy(to + done, from + done, size * sizeof(T));
    done += size;
  }
}

INLINE Ints load(const uint8_t* p) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(BERTFAST_AVX2)
  return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  Bytes x;
  std::memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, Ints);
#endif
}

// Load the first `count` < LANES elements; the others are zero.
template <class T>
INLINE Floats load(const T* p, int count) {
  T buffer[LANES] = {};
  copy_partial(buffer, p, count);
  return load(buffer);
}

template <class T>
INLINE void store(T* p, Floats x, int count) {
  T buffer[LANES];
  store(buffer, x);
  copy_partial(p, buffer, count);
}

// Store the low byte of each lane, or of the first `count`.
INLINE void store_bytes(uint8_t* p, Words x, int count) {
#if defined(__AVX512F__)
  const Bytes bytes = (Bytes)_mm512_cvtepi32_epi8((__m512i)x);
#elif defined(BERTFAST_AVX2)
  const __m256i words = (__m256i)(x & 0xff);
  const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  const Bytes bytes = (Bytes)_mm_cvtsi128_si64(_mm_packus_epi16(halves, halves));
#else
  const Bytes bytes = __builtin_convertvector(x & 0xff, Bytes);
#endif
  uint8_t buffer[LANES];
  std::memcpy(count == LANES ? p : buffer, &bytes, sizeof bytes);
  if (count < LANES) copy_partial(p, buffer, count);
}

// Elementwise maximum; b where either is NaN.
INLINE Floats maximum(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(BERTFAST_AVX2)
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// 1 / x within 2^-14 by the instruction of AVX-512, else exact.
INLINE Floats reciprocal_estimate(Floats x) {
#if defined(__AVX512F__)
  return (Floats)_mm512_rcp14_ps((__m512)x);
#else
  return 1.f / x;
#endif
}

INLINE Floats absolute(Floats x) { return (Floats)((Words)x & 0x7fffffff); }

INLINE float sum(Floats x) {
  float lanes[LANES];
  std::memcpy(lanes, &x, sizeof x);
  UNROLL_FOR (int width = LANES / 2; width > 0; width /= 2)
    UNROLL_FOR (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

INLINE float max_lane(Floats x) {
  float lanes[LANES];
  std::memcpy(lanes, &x, sizeof x);
  UNROLL_FOR (int width = LANES / 2; width > 0; width /= 2)
    UNROLL_FOR (int i = 0; i < width; ++i) lanes[i] = lanes[i + width] > lanes[i] ? lanes[i + width] : lanes[i];
  return lanes[0];
}

// Minimax polynomials of 2^f on [-1/2, 1/2], in relative error, highest power first: accurate to 1 ulp, or to 3e-6.
template <int DEGREE>
extern const float EXP2[DEGREE + 1];
template <>
constexpr float EXP2<6>[] = {
    1.5345812e-4f, 1.3399931e-3f, 9.6184891e-3f, 5.5503286e-2f, 2.4022646e-1f, 6.9314718e-1f, 1.f};
template <>
constexpr float EXP2<4>[] = {9.5828532e-3f, 5.5906425e-2f, 2.4024099e-1f, 6.9312419e-1f, 1.f};

// Replace each of N registers by 2^x, for x < 128; 0 for results below 2^-149, or 2^-127 before AVX-512; NaN stays NaN.
// The steps are interleaved, because the chains of several calls are too long for the CPU to overlap.
template <int DEGREE, int N>
INLINE void exp2(Floats (&x)[N]) {
  Floats n[N], p[N];  // n: the nearest integer; before AVX-512 it is kept as n + magic
#if defined(__AVX512F__)
  UNROLL_FOR (int i = 0; i < N; ++i) n[i] = (Floats)_mm512_roundscale_ps((__m512)x[i], _MM_FROUND_NO_EXC);
  UNROLL_FOR (int i = 0; i < N; ++i) x[i] -= n[i];
#else
  const Floats magic = splat(12583039.f);  // 1.5 · 2^23 + 127: adding it rounds to an integer and biases the exponent
  UNROLL_FOR (int i = 0; i < N; ++i) x[i] = maximum(splat(-127.f), x[i]);
  UNROLL_FOR (int i = 0; i < N; ++i) n[i] = x[i] + magic;
  UNROLL_FOR (int i = 0; i < N; ++i) x[i] -= n[i] - magic;
#endif
  UNROLL_FOR (int i = 0; i < N; ++i) p[i] = splat(EXP2<DEGREE>[0]);
  UNROLL_FOR (int power = 1; power <= DEGREE; ++power)
    UNROLL_FOR (int i = 0; i < N; ++i) p[i] = p[i] * x[i] + EXP2<DEGREE>[power];
  UNROLL_FOR (int i = 0; i < N; ++i)
#if defined(__AVX512F__)
    x[i] = (Floats)_mm512_scalef_ps((__m512)p[i], (__m512)n[i]);  // 0 for n = -inf, even if p is NaN
#else
    x[i] = p[i] * (Floats)((Words)n[i] << 23);
#endif
}

template <int DEGREE = 6>
INLINE Floats exp2(Floats x) {
  Floats registers[1] = {x};
  exp2<DEGREE>(registers);
  return registers[0];
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

// Round to bf16 and interleave: pairs with `first` in the lower half.
INLINE Words pack_bf16_pairs(Floats first, Floats second) {
#if defined(__AVX512BF16__)
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  const Words lanes = lane_ids();
  return (Words)_mm512_permutexvar_epi16((__m512i)(lanes | ((lanes + 16) << 16)), both);
#else
  return (rounded_to_bf16(first) >> 16) | (rounded_to_bf16(second) & 0xffff0000u);
#endif
}

// sum + a.first · b.first + a.second · b.second, for each pair of bf16.
INLINE Floats dot_pairs(Floats sum, Words a, Words b) {
#if defined(__AVX512BF16__)
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  const Words high = splat(0xffff0000u);
  sum += (Floats)(a & high) * (Floats)(b & high);
  return sum + (Floats)(a << 16) * (Floats)(b << 16);
#endif
}

#if defined(BERTFAST_HALVES)
// a.first · b.first + a.second · b.second, for each pair of int16.
INLINE Ints dot_halves(Words a, Words b) {
#if defined(__AVX512F__)
  return (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#else
  return (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#endif
}
#endif

// One step of a transpose: swap the lanes with bit DISTANCE set in a with those without it in b.
template <int DISTANCE, int... LANE>
INLINE void exchange(Words& a, Words& b, std::integer_sequence<int, LANE...>) {
  const Words x = a, y = b;
  a = __builtin_shufflevector(x, y, (LANE & DISTANCE ? LANES + LANE - DISTANCE : LANE)...);
  b = __builtin_shufflevector(x, y, (LANE & DISTANCE ? LANES + LANE : LANE + DISTANCE)...);
}

// Transpose LANES x LANES in place: lane j of row i becomes lane i of row j.
template <int DISTANCE = LANES / 2>
INLINE void transpose(Words rows[LANES]) {
  UNROLL_FOR (int i = 0; i < LANES; ++i)
    if (!(i & DISTANCE)) exchange<DISTANCE>(rows[i], rows[i + DISTANCE], std::make_integer_sequence<int, LANES>{});
  if constexpr (DISTANCE > 1) transpose<DISTANCE / 2>(rows);
}

// Philox4x32-10 (Salmon et al., 2011), CALLS per 64-bit lane; see bertfast/ops/dropout.py. calls[i] holds the four
// counter words, and on return the four random words, in the lower half of each lane; the upper halves are undefined.
template <int CALLS>
INLINE void philox(Longs (&calls)[CALLS][4], uint64_t seed) {
  const auto multiply = [](Longs x, uint32_t factor) -> Longs {  // 32 x 32 -> 64 bits, of the lower halves
#if defined(__AVX512F__)
    return (Longs)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(factor));
#elif defined(BERTFAST_AVX2)
    return (Longs)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(factor));
#else
    return (x & 0xffffffff) * factor;
#endif
  };
  uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
  UNROLL_FOR (int round = 0; round < 10; ++round) {
    UNROLL_FOR (int i = 0; i < CALLS; ++i) {
      Longs* const c = calls[i];
      const Longs a = multiply(c[0], 0xD2511F53), b = multiply(c[2], 0xCD9E8D57);
      c[0] = (b >> 32) ^ (c[1] ^ key0);
      c[1] = b;
      c[2] = (a >> 32) ^ (c[3] ^ key1);
      c[3] = a;
    }
    key0 += 0x9E3779B9, key1 += 0xBB67AE85;
  }
}

// Philox of the counters (c0, c1, c2, c3), one in each of LANES 32-bit lanes.
INLINE void philox(Words c0, Words c1, uint32_t c2, uint32_t c3, uint64_t seed, Words out[4]) {
  const Longs even0 = (Longs)c0, even1 = (Longs)c1;
  Longs calls[2][4] = {{even0, even1, c2 - Longs{}, c3 - Longs{}},
                       {even0 >> 32, even1 >> 32, c2 - Longs{}, c3 - Longs{}}};
  philox(calls, seed);
  UNROLL_FOR (int i = 0; i < 4; ++i) out[i] = (Words)((calls[0][i] & 0xffffffff) | (calls[1][i] << 32));
}

// The order in which store_calls writes the lanes of a Longs, chosen so that it needs only shuffles within 16 bytes.
INLINE Longs call_ids() {
  Longs numbers;
  for (int i = 0; i < LANES / 2; ++i) numbers[i] = i / 2 + i % 2 * (LANES / 4);
  return numbers;
}

// Write the four words of each lane, 16 bytes, lane after lane in the order of call_ids.
INLINE void store_calls(uint8_t* p, const Longs call[4]) {
  const Longs low = (call[0] & 0xffffffff) | (call[1] << 32), high = (call[2] & 0xffffffff) | (call[3] << 32);
  Longs even, odd;  // shuffle indices into (low, high)
  for (int i = 0; i < LANES / 2; i += 2)
    even[i] = i, even[i + 1] = LANES / 2 + i, odd[i] = i + 1, odd[i + 1] = LANES / 2 + i + 1;
  const Longs first = __builtin_shuffle(low, high, even), second = __builtin_shuffle(low, high, odd);
  std::memcpy(p, &first, sizeof first);
  std::memcpy(p + sizeof first, &second, sizeof second);
}

}  // namespace bertfast::BERTFAST_SET
