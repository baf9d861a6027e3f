// Products of small blocks that lie in the cache, and how blocks are laid out for them.
//
// An element is a float, or a pair of bf16 (uint32_t), where depth counts pairs.
#pragma once
#include "vector.h"

namespace bertfast::BERTFAST_SET {

// What a product is added to: nothing, what is there, or that with each column rescaled.
enum class Start { zero, sum, rescaled };

// A matrix of which rows are `row_step` and columns `step` elements apart.
template <class E>
struct Strided {
  const E* data;
  int64_t row_step, step;
};

// c[ROWS][REGISTERS · LANES] = a[ROWS][depth] · b[depth][…], all sums in registers.
template <class E, int ROWS, int REGISTERS, Start START>
INLINE void multiply_tile(Strided<E> a, int depth, const E* b, int64_t b_step, float* c, int64_t c_step,
                          const float* rescale) {
  Floats sums[ROWS][REGISTERS] = {};
  for (int k = 0; k < depth; ++k) {
    decltype(load(b)) right[REGISTERS];
    UNROLL for (int j = 0; j < REGISTERS; ++j) right[j] = load(b + k * b_step + j * LANES);
    UNROLL for (int i = 0; i < ROWS; ++i)
      UNROLL for (int j = 0; j < REGISTERS; ++j)
        sums[i][j] = multiply_add(a.data[i * a.row_step + k * a.step], right[j], sums[i][j]);
  }
  UNROLL for (int i = 0; i < ROWS; ++i)
    UNROLL for (int j = 0; j < REGISTERS; ++j) {
      float* const place = c + i * c_step + j * LANES;
      // Added last: a sum of short sums is more exact than a long one.
      if constexpr (START == Start::sum) sums[i][j] += load(place);
      if constexpr (START == Start::rescaled) sums[i][j] += load(place) * load(rescale + j * LANES);
      store(place, sums[i][j]);
    }
}

template <class E, int REGISTERS, Start START>
static void multiply_columns(Strided<E> a, int rows, int depth, const E* b, int64_t b_step, float* c, int64_t c_step,
                             const float* rescale) {
  constexpr int ROWS = REGISTERS <= (LANES == 16 ? 2 : 1) ? 8 : 4;  // as many sums as there are registers for
  for (int i = 0; i < rows; i += ROWS)
    multiply_tile<E, ROWS, REGISTERS, START>({a.data + i * a.row_step, a.row_step, a.step}, depth, b, b_step,
                                             c + i * c_step, c_step, rescale);
}

// c[rows][columns] = a[rows][depth] · b[depth][columns]; rows are a multiple of 8, columns of LANES.
template <class E, Start START>
INLINE void multiply(Strided<E> a, int rows, int depth, const E* b, int64_t b_step, int columns, float* c,
                     int64_t c_step, const float* rescale = nullptr) {
  constexpr int WIDEST = LANES == 16 ? 4 : 3;
  for (int j = 0, left = columns / LANES; left > 0;) {
    // No single register is left over, which would keep the multipliers half busy.
    const int taken = left == WIDEST || left >= WIDEST + 2 ? WIDEST : left > WIDEST ? (left + 1) / 2 : left;
    const E* const right = b + j * LANES;
    float* const out = c + j * LANES;
    const float* const factors = rescale + (START == Start::rescaled ? j * LANES : 0);
    switch (taken) {
      case 1: multiply_columns<E, 1, START>(a, rows, depth, right, b_step, out, c_step, factors); break;
      case 2: multiply_columns<E, 2, START>(a, rows, depth, right, b_step, out, c_step, factors); break;
      case 3: multiply_columns<E, 3, START>(a, rows, depth, right, b_step, out, c_step, factors); break;
      default: multiply_columns<E, WIDEST, START>(a, rows, depth, right, b_step, out, c_step, factors);
    }
    j += taken, left -= taken;
  }
}

// Transposition goes by 4 x 4.
template <class E>
struct FourOf {
  typedef E Type __attribute__((vector_size(4 * sizeof(E))));
};
template <class E>
using Four = typename FourOf<E>::Type;

template <class E>
INLINE void transpose(Four<E> (&x)[4]) {
  const Four<E> a = __builtin_shufflevector(x[0], x[1], 0, 4, 1, 5), b = __builtin_shufflevector(x[0], x[1], 2, 6, 3, 7);
  const Four<E> c = __builtin_shufflevector(x[2], x[3], 0, 4, 1, 5), d = __builtin_shufflevector(x[2], x[3], 2, 6, 3, 7);
  x[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5), x[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
  x[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5), x[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
}

template <class E>
INLINE Four<E> load_four(const E* p) {
  Four<E> x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

INLINE Four<float> load_four(const BFloat16* p) {
  uint16_t __attribute__((vector_size(8))) x;
  std::memcpy(&x, p, sizeof x);
  return (Four<float>)(__builtin_convertvector(x, Four<uint32_t>) << 16);
}

INLINE void store_four(float* p, Four<float> x) { std::memcpy(p, &x, sizeof x); }

INLINE void store_four(BFloat16* p, Four<float> x) {
  Floats wide{};
  std::memcpy(&wide, &x, sizeof x);
  const Halves rounded = narrow(wide);
  std::memcpy(p, &rounded, 4 * sizeof(BFloat16));
}

// `out`[width][columns] of `count` rows [width] that lie `stride` apart; zero from `count` to `columns`, both multiples
// of 4 but for `count`.
template <class E, class T>
INLINE void pack_transposed(const T* rows, int64_t stride, int count, int width, int columns, E* out, int64_t out_step) {
  for (int i = 0; i < columns; i += 4)
    for (int k = 0; k < width; k += 4) {
      Four<E> x[4];
      UNROLL for (int r = 0; r < 4; ++r) x[r] = i + r < count ? load_four(rows + (i + r) * stride + k) : Four<E>{};
      transpose<E>(x);
      UNROLL for (int r = 0; r < 4; ++r) std::memcpy(out + (k + r) * out_step + i, &x[r], sizeof x[r]);
    }
}

// The first `count` columns of c[width][…] as rows [width] that lie `stride` apart.
template <class T>
INLINE void store_transposed(const float* c, int64_t c_step, int count, int width, T* rows, int64_t stride) {
  for (int i = 0; i < count; i += 4)
    for (int k = 0; k < width; k += 4) {
      Four<float> x[4];
      UNROLL for (int r = 0; r < 4; ++r) x[r] = load_four(c + (k + r) * c_step + i);
      transpose<float>(x);
      UNROLL for (int r = 0; r < 4; ++r)
        if (i + r < count) store_four(rows + (i + r) * stride + k, x[r]);
    }
}

}  // namespace bertfast::BERTFAST_SET
