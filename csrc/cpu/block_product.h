// Products of blocks that lie in the caches: c = a b or c += a b, where registers hold parts of the rows of b and c.
#pragma once
#include "vector.h"

namespace bertfast::BERTFAST_SET {

// What tensors of type T are multiplied as: numbers in fp32, or pairs of bf16 that are neighbours along the sum.
template <class T>
struct FactorOf {
  using type = float;
};
#if defined(BERTFAST_PAIRS)
template <>
struct FactorOf<BFloat16> {
  using type = uint32_t;
};
#endif
template <class T>
using Factor = typename FactorOf<T>::type;
template <class F>
constexpr int NUMBERS = 1;  // in a factor
template <>
constexpr int NUMBERS<uint32_t> = 2;

INLINE Floats add_product(Floats sum, Floats a, Floats b) { return sum + a * b; }
INLINE Floats add_product(Floats sum, Words a, Words b) { return dot_pairs(sum, a, b); }

// What becomes of what c held. It is added last: sums of fewer numbers, none of them large, err less.
struct Before {
  bool forgotten;
  const float* factors = nullptr;  // by which its rows are multiplied, if given
};

// c [ROWS, COLUMNS registers]; element (row, k) of a is at row · A_ROW + k · A_DEPTH; b and c have rows of WIDTH.
template <int ROWS, int COLUMNS, int A_ROW, int A_DEPTH, int WIDTH, class F>
[[gnu::noinline]] static void product_tile(const F* a, const F* b, int depth, float* c, Before before) {
  Floats sums[ROWS][COLUMNS] = {};
  for (int k = 0; k < depth; ++k) {
    decltype(load(b)) row[COLUMNS];
    UNROLL for (int j = 0; j < COLUMNS; ++j) row[j] = load(b + k * WIDTH + j * LANES);
    UNROLL for (int i = 0; i < ROWS; ++i) {
      const auto factor = splat(a[i * A_ROW + k * A_DEPTH]);
      UNROLL for (int j = 0; j < COLUMNS; ++j) sums[i][j] = add_product(sums[i][j], factor, row[j]);
    }
  }
  UNROLL for (int i = 0; i < ROWS; ++i) {
    const float factor = before.factors ? before.factors[i] : 1;
    UNROLL for (int j = 0; j < COLUMNS; ++j) {
      float* const place = c + i * WIDTH + j * LANES;
      store(place, before.forgotten ? sums[i][j] : sums[i][j] + load(place) * factor);
    }
  }
}

constexpr int TILE_COLUMNS = REGISTERS == 32 ? 4 : 2;
constexpr int tile_rows(int columns) {
  const int rows = (REGISTERS - columns - 2) / columns / 2 * 2;
  return rows < 8 ? rows : 8;
}

template <int ROWS, int COLUMNS, int A_ROW, int A_DEPTH, int WIDTH, class F>
INLINE void product_strip(const F* a, const F* b, int depth, float* c, int rows, Before before) {
  for (; rows >= ROWS; rows -= ROWS) {
    product_tile<ROWS, COLUMNS, A_ROW, A_DEPTH, WIDTH>(a, b, depth, c, before);
    a += ROWS * A_ROW, c += ROWS * WIDTH;
    if (before.factors) before.factors += ROWS;
  }
  if constexpr (ROWS > 2)
    if (rows) product_strip<ROWS - 2, COLUMNS, A_ROW, A_DEPTH, WIDTH>(a, b, depth, c, rows, before);
}

// An even number of rows, and `columns` registers of each.
template <int A_ROW, int A_DEPTH, int WIDTH, int COLUMNS = TILE_COLUMNS, class F>
INLINE void product(const F* a, const F* b, int depth, float* c, int rows, int columns, Before before) {
  for (; columns >= COLUMNS; columns -= COLUMNS) {
    product_strip<tile_rows(COLUMNS), COLUMNS, A_ROW, A_DEPTH, WIDTH>(a, b, depth, c, rows, before);
    b += COLUMNS * LANES, c += COLUMNS * LANES;
  }
  if constexpr (COLUMNS > 1)
    if (columns) product<A_ROW, A_DEPTH, WIDTH, COLUMNS - 1>(a, b, depth, c, rows, columns, before);
}

}  // namespace bertfast::BERTFAST_SET
