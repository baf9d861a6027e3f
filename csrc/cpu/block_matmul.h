// Matmul of blocks that are in cache: c = a b or c += a b, register-tiled over the rows of b and c.
#pragma once
#include "vector.h"

namespace bertfast::BERTFAST_SET {

// The operand type for tensors of type T: fp32, or pairs of bf16 that are adjacent along the reduction.
template <class T>
struct OperandOf {
  using type = float;
};
#if defined(BERTFAST_PAIRS)
template <>
struct OperandOf<BFloat16> {
  using type = uint32_t;
};
#endif
template <class T>
using Operand = typename OperandOf<T>::type;
template <class F>
constexpr int ELEMENTS = 1;  // per operand
template <>
constexpr int ELEMENTS<uint32_t> = 2;

INLINE Floats multiply_add(Floats sum, Floats a, Floats b) { return sum + a * b; }
INLINE Floats multiply_add(Floats sum, Words a, Words b) { return dot_pairs(sum, a, b); }

// What happens to the old contents of c. They are added after the reduction, whose partial sums are smaller, so that
// rounding errors are smaller too.
struct Accumulate {
  bool overwrite;
  const float* row_scales = nullptr;  // factors of the rows of the old c, if given
};

// A tile of c [ROWS, COLUMNS registers]; a(row, k) is at row · A_ROW + k · A_DEPTH; rows of b and c are WIDTH apart.
template <int ROWS, int COLUMNS, int A_ROW, int A_DEPTH, int WIDTH, class F>
[[gnu::noinline]] static void matmul_tile(const F* a, const F* b, int depth, float* c, Accumulate accumulate) {
  Floats sums[ROWS][COLUMNS] = {};
  for (int k = 0; k < depth; ++k) {
    decltype(load(b)) row[COLUMNS];
    UNROLL_FOR (int j = 0; j < COLUMNS; ++j) row[j] = load(b + k * WIDTH + j * LANES);
    UNROLL_FOR (int i = 0; i < ROWS; ++i) {
      const auto factor = splat(a[i * A_ROW + k * A_DEPTH]);
      UNROLL_FOR (int j = 0; j < COLUMNS; ++j) sums[i][j] = multiply_add(sums[i][j], factor, row[j]);
    }
  }
  UNROLL_FOR (int i = 0; i < ROWS; ++i) {
    const float scale = accumulate.row_scales ? accumulate.row_scales[i] : 1;
    UNROLL_FOR (int j = 0; j < COLUMNS; ++j) {
      float* const element = c + i * WIDTH + j * LANES;
      store(element, accumulate.overwrite ? sums[i][j] : sums[i][j] + load(element) * scale);
    }
  }
}

// Default of what matmul calls after each tile.
struct DoNothing {
  [[gnu::always_inline]] void operator()() const {}
};

constexpr int MAX_TILE_ROWS = 8;
constexpr int TILE_COLUMNS = REGISTERS == 32 ? 4 : 2;
constexpr int tile_rows(int columns) {
  const int rows = (REGISTERS - columns - 2) / columns / 2 * 2;
  return rows < MAX_TILE_ROWS ? rows : MAX_TILE_ROWS;
}

template <int ROWS, int COLUMNS, int A_ROW, int A_DEPTH, int WIDTH, class F, class AfterTile>
INLINE void matmul_strip(const F* a, const F* b, int depth, float* c, int rows, Accumulate accumulate,
                         const AfterTile& after_tile) {
  for (; rows >= ROWS; rows -= ROWS) {
    matmul_tile<ROWS, COLUMNS, A_ROW, A_DEPTH, WIDTH>(a, b, depth, c, accumulate);
    after_tile();
    a += ROWS * A_ROW, c += ROWS * WIDTH;
    if (accumulate.row_scales) accumulate.row_scales += ROWS;
  }
  if constexpr (ROWS > 2)
    if (rows) matmul_strip<ROWS - 2, COLUMNS, A_ROW, A_DEPTH, WIDTH>(a, b, depth, c, rows, accumulate, after_tile);
}

// c [rows, columns registers], an even number of rows. after_tile() is called after each tile.
template <int A_ROW, int A_DEPTH, int WIDTH, int COLUMNS = TILE_COLUMNS, class F, class AfterTile = DoNothing>
INLINE void matmul(const F* a, const F* b, int depth, float* c, int rows, int columns, Accumulate accumulate,
                   const AfterTile& after_tile = {}) {
  for (; columns >= COLUMNS; columns -= COLUMNS) {
    matmul_strip<tile_rows(COLUMNS), COLUMNS, A_ROW, A_DEPTH, WIDTH>(a, b, depth, c, rows, accumulate, after_tile);
    b += COLUMNS * LANES, c += COLUMNS * LANES;
  }
  if constexpr (COLUMNS > 1)
    if (columns) matmul<A_ROW, A_DEPTH, WIDTH, COLUMNS - 1>(a, b, depth, c, rows, columns, accumulate, after_tile);
}

}  // namespace bertfast::BERTFAST_SET
