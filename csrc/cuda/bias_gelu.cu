#include "../bias_gelu.h"

#include "gelu.cuh"
#include "kernels.h"
#include "load_store.cuh"

namespace bertfast::cuda {

constexpr int GELU_THREADS = 128, COLUMNS_PER_BLOCK = GELU_THREADS * 8;
constexpr int MAX_ROWS_IN_FLIGHT = 4;  // rows whose loads a thread issues together
// Forward many small blocks, which the hardware distributes evenly; backward, where each writes a sum, those that are
// resident.
constexpr int FORWARD_BLOCKS_PER_SM = 32, BACKWARD_BLOCKS_PER_SM = 4;

// The grid, flattened with columns first: column_blocks x row_programs, each program with every row_programs-th row.
struct Grid {
  int column_blocks, row_programs;

  DEVICE int column() const { return ((int)blockIdx.x % column_blocks * GELU_THREADS + (int)threadIdx.x) * 8; }
  DEVICE int64_t first_row() const { return blockIdx.x / column_blocks; }
};

static int column_blocks(int64_t columns) { return (int)((columns + COLUMNS_PER_BLOCK - 1) / COLUMNS_PER_BLOCK); }

// The number of blocks that share the rows of a column block: blocks_per_sm in all, or fewer for few rows.
static int row_programs(int64_t rows, int64_t columns, int blocks_per_sm) {
  if (columns == 0) return 1;  // of no column block
  const int across = column_blocks(columns), most = (sm_count() * blocks_per_sm + across - 1) / across;
  const int64_t needed = (rows + MAX_ROWS_IN_FLIGHT - 1) / MAX_ROWS_IN_FLIGHT;
  return (int)(needed < 1 ? 1 : needed < most ? needed : most);
}

int bias_gelu_parts(int64_t rows, int64_t columns) { return row_programs(rows, columns, BACKWARD_BLOCKS_PER_SM); }

template <class T, bool ALIGNED, bool TANH>
__global__ void __launch_bounds__(GELU_THREADS) bias_gelu_forward_kernel(const BiasGeluForward a, const Grid at) {
  constexpr int ROWS_IN_FLIGHT = ALIGNED ? MAX_ROWS_IN_FLIGHT : 1;
  const int column = at.column(), columns = (int)a.columns;
  float bias[8];
  UNROLL_FOR (int j = 0; j < 8; ++j) bias[j] = column + j < columns ? widen(a.bias, column + j) : 0;
  for (int64_t first = at.first_row(); first < a.tokens; first += (int64_t)ROWS_IN_FLIGHT * at.row_programs) {
    float x[ROWS_IN_FLIGHT][8];
    UNROLL_FOR (int i = 0; i < ROWS_IN_FLIGHT; ++i) {
      const int64_t token = first + (int64_t)i * at.row_programs;
      if (token < a.tokens) load_8<ALIGNED>(row<T>(a.x, token), column, columns, x[i]);
    }
    UNROLL_FOR (int i = 0; i < ROWS_IN_FLIGHT; ++i) {
      const int64_t token = first + (int64_t)i * at.row_programs;
      if (token >= a.tokens) break;
      UNROLL_FOR (int j = 0; j < 8; ++j) x[i][j] = gelu<TANH>(x[i][j] + bias[j]).value;
      store_8<ALIGNED>(row<T>(a.y, token), column, columns, x[i]);
    }
  }
}

template <class T, bool ALIGNED, bool TANH>
__global__ void __launch_bounds__(GELU_THREADS) bias_gelu_backward_kernel(const BiasGeluBackward a, const Grid at) {
  constexpr int ROWS_IN_FLIGHT = ALIGNED ? MAX_ROWS_IN_FLIGHT : 1;
  const int column = at.column(), columns = (int)a.columns;
  float bias[8], sum[8] = {};
  UNROLL_FOR (int j = 0; j < 8; ++j) bias[j] = column + j < columns ? widen(a.bias, column + j) : 0;
  for (int64_t first = at.first_row(); first < a.tokens; first += (int64_t)ROWS_IN_FLIGHT * at.row_programs) {
    float x[ROWS_IN_FLIGHT][8], d_y[ROWS_IN_FLIGHT][8];
    UNROLL_FOR (int i = 0; i < ROWS_IN_FLIGHT; ++i) {
      const int64_t token = first + (int64_t)i * at.row_programs;
      if (token >= a.tokens) break;
      load_8<ALIGNED>(row<T>(a.x, token), column, columns, x[i]);
      load_8<ALIGNED>(row<T>(a.d_y, token), column, columns, d_y[i]);
    }
    UNROLL_FOR (int i = 0; i < ROWS_IN_FLIGHT; ++i) {
      const int64_t token = first + (int64_t)i * at.row_programs;
      if (token >= a.tokens) break;
      UNROLL_FOR (int j = 0; j < 8; ++j) {
        x[i][j] = d_y[i][j] * gelu<TANH>(x[i][j] + bias[j]).slope;
        sum[j] += x[i][j];
      }
      store_8<ALIGNED>(row<T>(a.d_x, token), column, columns, x[i]);
    }
  }
  store_8<false>(a.d_bias + at.first_row() * a.columns, column, columns, sum);
}

// Call f with the element type, and with `aligned` and `tanh` as compile-time constants.
template <class F>
static void with_variant(Type type, bool aligned, bool tanh, const F& f) {
  with_type(type, [&](auto element) {
    const auto with_curve = [&](auto constant) {
      if (tanh) f(element, constant, std::true_type{});
      else f(element, constant, std::false_type{});
    };
    if (aligned) with_curve(std::true_type{});
    else with_curve(std::false_type{});
  });
}

void bias_gelu_forward(const BiasGeluForward& a, Stream stream) {
  const Grid at = {column_blocks(a.columns), row_programs(a.tokens, a.columns, FORWARD_BLOCKS_PER_SM)};
  const bool aligned = is_aligned(a.x, a.columns) && is_aligned(a.y, a.columns);
  with_variant(a.x.type, aligned, a.tanh,
               [&]<class T, bool ALIGNED, bool TANH>(T, std::bool_constant<ALIGNED>, std::bool_constant<TANH>) {
                 launch(bias_gelu_forward_kernel<T, ALIGNED, TANH>, at.column_blocks * at.row_programs, GELU_THREADS, 0,
                        stream, a, at);
               });
}

void bias_gelu_backward(const BiasGeluBackward& a, Stream stream) {
  const Grid at = {column_blocks(a.columns), a.parts};
  const bool aligned = is_aligned(a.x, a.columns) && is_aligned(a.d_y, a.columns) && is_aligned(a.d_x, a.columns);
  with_variant(a.x.type, aligned, a.tanh,
               [&]<class T, bool ALIGNED, bool TANH>(T, std::bool_constant<ALIGNED>, std::bool_constant<TANH>) {
                 launch(bias_gelu_backward_kernel<T, ALIGNED, TANH>, at.column_blocks * at.row_programs, GELU_THREADS,
                        0, stream, a, at);
               });
}

}  // namespace bertfast::cuda
