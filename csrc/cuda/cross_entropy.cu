// A block for each row finds the loss; then warps, each with some columns, turn logits into their gradient and add it up
// down the rows. The logits of a chunk stay in the second-level cache from one to the other.
#include "../cross_entropy.h"

#include "kernels.h"
#include "numbers.cuh"

namespace bertfast::cuda {

constexpr int LOSS_THREADS = 256, GRADIENT_WARPS = 16;
constexpr int GRADIENT_COLUMNS = 32 * 8;  // of a block
constexpr float LOWEST = -3.402823466e38f;  // what nothing but -inf is below: -inf - -inf is no number

// Of the largest and the sum of exponentials relative to it, over some of a row's logits.
struct Softmax {
  float most, total;

  DEVICE void add(Softmax other) {
    const float larger = fmaxf(most, other.most);
    total = total * expf(most - larger) + other.total * expf(other.most - larger);
    most = larger;
  }
};

// A row's 8 logits with their bias, -inf where there is none.
template <bool WHOLE, class T>
DEVICE void load_logits(const CrossEntropy& a, int64_t number, int column, float (&x)[8]) {
  const int columns = (int)a.vocabulary;
  load_8<WHOLE>(row<T>(a.logits, number), column, columns, x);
  UNROLL for (int j = 0; j < 8; ++j) x[j] = column + j < columns ? x[j] + widen(a.bias, column + j) : -INFINITY;
}

// Writes a row's loss, and to a.softmax what makes its exponentials probabilities: log2 e · largest, and their sum's
// inverse, 0 where there is no label.
template <class T, bool WHOLE>
__global__ void __launch_bounds__(LOSS_THREADS) loss_kernel(const CrossEntropy a) {
  SHARED_ARRAY(Softmax, of_warp, LOSS_THREADS / 32);
  SHARED_ARRAY(int, first_of_warp, LOSS_THREADS / 32);
  const int64_t number = blockIdx.x, label = a.labels[number];
  const int columns = (int)a.vocabulary;
  const bool there = label < a.vocabulary;  // a label outside of the vocabulary makes the loss no number
  const int64_t at = label < 0 || !there ? 0 : label;
  const float target = there ? widen(row<T>(a.logits, number)[at]) + widen(a.bias, at) : NAN;
  Softmax softmax_of_thread = {LOWEST, 0};
  int first = columns;  // the first column that reaches the target: of equal logits argmax takes the first
  for (int column = (int)threadIdx.x * 8; column < columns; column += LOSS_THREADS * 8) {
    float x[8];
    load_logits<WHOLE, T>(a, number, column, x);
    Softmax some = {LOWEST, 0};
    UNROLL for (int j = 0; j < 8; ++j) some.most = fmaxf(some.most, x[j]);
    UNROLL for (int j = 0; j < 8; ++j) {
      some.total += expf(x[j] - some.most);
      if (x[j] >= target && column + j < first) first = column + j;
    }
    softmax_of_thread.add(some);
  }
  UNROLL for (int lanes = 16; lanes > 0; lanes /= 2) {
    softmax_of_thread.add({__shfl_xor_sync(~0u, softmax_of_thread.most, lanes),
                           __shfl_xor_sync(~0u, softmax_of_thread.total, lanes)});
    const int other = __shfl_xor_sync(~0u, first, lanes);
    first = other < first ? other : first;
  }
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = softmax_of_thread, first_of_warp[threadIdx.x / 32] = first;
  __syncthreads();
  if (threadIdx.x != 0) return;
  Softmax whole = of_warp[0];
  for (int i = 1; i < LOSS_THREADS / 32; ++i) {
    whole.add(of_warp[i]);
    first = first_of_warp[i] < first ? first_of_warp[i] : first;
  }
  a.losses[number] = label < 0 ? 0.f : whole.most - target + logf(whole.total);
  a.correct[number] = label >= 0 && first == label && whole.most == target;
  a.softmax[2 * number] = whole.most, a.softmax[2 * number + 1] = label < 0 ? 0.f : 1.f / whole.total;
}

// A vocabulary of BERT's size gives fewer blocks than a GPU has SMs, so one per SM is enough. Without that bound, ptxas of
// CUDA 13.2 and later keeps to 64 registers for a second block, and spills on sm_100 and sm_120.
template <class T, bool WHOLE>
__global__ void __launch_bounds__(GRADIENT_WARPS * 32, 1) gradient_kernel(const CrossEntropy a) {
  SHARED_ARRAY(float, total, GRADIENT_COLUMNS);
  const int columns = (int)a.vocabulary, warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
  const int column = (int)blockIdx.x * GRADIENT_COLUMNS + lane * 8;
  float sum[8] = {};
  UNROLL_SOME for (int64_t number = warp; number < a.rows; number += GRADIENT_WARPS) {
    float x[8];
    load_logits<WHOLE, T>(a, number, column, x);
    const float most = a.softmax[2 * number], factor = a.softmax[2 * number + 1];
    const int64_t label = a.labels[number];
    UNROLL for (int j = 0; j < 8; ++j) {
      const float p = factor == 0 ? 0.f : expf(x[j] - most) * factor;
      x[j] = column + j == label ? p - 1 : p;
      sum[j] += x[j];
    }
    store_8<WHOLE>(row<T>(a.logits, number), column, columns, x);
  }
  for (int turn = 0; turn < GRADIENT_WARPS; ++turn) {
    if (warp == turn) UNROLL for (int j = 0; j < 8; ++j) total[lane * 8 + j] = sum[j] += turn ? total[lane * 8 + j] : 0;
    __syncthreads();
  }
  if (warp == 0)
    UNROLL for (int j = 0; j < 8; ++j)
      if (column + j < columns) a.d_bias[column + j] += total[lane * 8 + j];
}

void cross_entropy(const CrossEntropy& a, Stream stream) {
  with_type(a.logits.type, [&]<class T>(T) {
    // Rows of an odd vocabulary lie apart, and what is behind each may be written.
    const bool whole = is_whole(a.logits, 8) && a.logits.stride >= (a.vocabulary + 7) / 8 * 8;
    launch(whole ? loss_kernel<T, true> : loss_kernel<T, false>, (int)a.rows, LOSS_THREADS, 0, stream, a);
    if (a.d_bias == nullptr || a.rows == 0) return;
    const int blocks = (int)((a.vocabulary + GRADIENT_COLUMNS - 1) / GRADIENT_COLUMNS);
    launch(whole ? gradient_kernel<T, true> : gradient_kernel<T, false>, blocks, GRADIENT_WARPS * 32, 0, stream, a);
  });
}

}  // namespace bertfast::cuda
