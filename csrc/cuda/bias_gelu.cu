#include "../bias_gelu.h"

#include "gelu.cuh"
#include "kernels.h"
#include "numbers.cuh"

namespace bertfast::cuda {

constexpr int GELU_THREADS = 128, STRETCH = GELU_THREADS * 8;  // columns of a block
constexpr int MOST_TOGETHER = 4;  // rows whose loads are under way at the same time
constexpr int BLOCKS_EACH = 8;    // of a multiprocessor

// Blocks are numbered along the columns first; `strip` is a block's first row.
struct Strips {
  int stretches, count;

  DEVICE int column() const { return ((int)blockIdx.x % stretches * GELU_THREADS + (int)threadIdx.x) * 8; }
  DEVICE int64_t strip() const { return blockIdx.x / stretches; }
};

static int stretches(int64_t columns) { return (int)((columns + STRETCH - 1) / STRETCH); }

static int strips(int64_t rows, int64_t columns) {
  const int each = stretches(columns), most = (multiprocessors() * BLOCKS_EACH + each - 1) / each;
  const int64_t enough = (rows + MOST_TOGETHER - 1) / MOST_TOGETHER;
  return (int)(enough < 1 ? 1 : enough < most ? enough : most);
}

int bias_gelu_parts(int64_t rows, int64_t columns) { return strips(rows, columns); }

template <class T, bool WHOLE>
__global__ void __launch_bounds__(GELU_THREADS) bias_gelu_forward_kernel(const BiasGeluForward a, const Strips at) {
  constexpr int TOGETHER = WHOLE ? MOST_TOGETHER : 1;
  const int column = at.column(), columns = (int)a.columns;
  float bias[8];
  UNROLL for (int j = 0; j < 8; ++j) bias[j] = column + j < columns ? widen(a.bias, column + j) : 0;
  for (int64_t first = at.strip(); first < a.tokens; first += (int64_t)TOGETHER * at.count) {
    float x[TOGETHER][8];
    UNROLL for (int i = 0; i < TOGETHER; ++i) {
      const int64_t token = first + (int64_t)i * at.count;
      if (token < a.tokens) load_8<WHOLE>(row<T>(a.x, token), column, columns, x[i]);
    }
    UNROLL for (int i = 0; i < TOGETHER; ++i) {
      const int64_t token = first + (int64_t)i * at.count;
      if (token >= a.tokens) break;
      UNROLL for (int j = 0; j < 8; ++j) x[i][j] = gelu(x[i][j] + bias[j], a.tanh).value;
      store_8<WHOLE>(row<T>(a.y, token), column, columns, x[i]);
    }
  }
}

template <class T, bool WHOLE>
__global__ void __launch_bounds__(GELU_THREADS) bias_gelu_backward_kernel(const BiasGeluBackward a, const Strips at) {
  constexpr int TOGETHER = WHOLE ? MOST_TOGETHER : 1;
  const int column = at.column(), columns = (int)a.columns;
  float bias[8], sum[8] = {};
  UNROLL for (int j = 0; j < 8; ++j) bias[j] = column + j < columns ? widen(a.bias, column + j) : 0;
  for (int64_t first = at.strip(); first < a.tokens; first += (int64_t)TOGETHER * at.count) {
    float x[TOGETHER][8], d_y[TOGETHER][8];
    UNROLL for (int i = 0; i < TOGETHER; ++i) {
      const int64_t token = first + (int64_t)i * at.count;
      if (token >= a.tokens) break;
      load_8<WHOLE>(row<T>(a.x, token), column, columns, x[i]);
      load_8<WHOLE>(row<T>(a.d_y, token), column, columns, d_y[i]);
    }
    UNROLL for (int i = 0; i < TOGETHER; ++i) {
      const int64_t token = first + (int64_t)i * at.count;
      if (token >= a.tokens) break;
      UNROLL for (int j = 0; j < 8; ++j) {
        x[i][j] = d_y[i][j] * gelu(x[i][j] + bias[j], a.tanh).slope;
        sum[j] += x[i][j];
      }
      store_8<WHOLE>(row<T>(a.d_x, token), column, columns, x[i]);
    }
  }
  store_8<false>(a.d_bias + at.strip() * a.columns, column, columns, sum);
}

void bias_gelu_forward(const BiasGeluForward& a, Stream stream) {
  const Strips at = {stretches(a.columns), strips(a.tokens, a.columns)};
  with_type(a.x.type, [&]<class T>(T) {
    const bool whole = is_whole(a.x, a.columns) && is_whole(a.y, a.columns);
    launch(whole ? bias_gelu_forward_kernel<T, true> : bias_gelu_forward_kernel<T, false>, at.stretches * at.count,
           GELU_THREADS, 0, stream, a, at);
  });
}

void bias_gelu_backward(const BiasGeluBackward& a, Stream stream) {
  const Strips at = {stretches(a.columns), a.parts};
  with_type(a.x.type, [&]<class T>(T) {
    const bool whole = is_whole(a.x, a.columns) && is_whole(a.d_y, a.columns) && is_whole(a.d_x, a.columns);
    launch(whole ? bias_gelu_backward_kernel<T, true> : bias_gelu_backward_kernel<T, false>, at.stretches * at.count,
           GELU_THREADS, 0, stream, a, at);
  });
}

}  // namespace bertfast::cuda
