// Cross entropy of a chunk of logits. One block per row computes the loss; a second kernel, whose warps share a range
// of columns, replaces logits by their gradient and sums it over rows. The chunk's logits stay in L2 between the two.
#include "../cross_entropy.h"

#include "kernels.h"
#include "load_store.cuh"

namespace bertfast::cuda {

constexpr int LOSS_THREADS = 256, GRADIENT_WARPS = 16;
constexpr int GRADIENT_COLUMNS = 32 * 8;       // of a block
constexpr float MIN_FLOAT = -3.402823466e38f;  // initial maximum; with -inf, -inf - -inf would be NaN

// Maximum of a row's logits so far, and the sum of exponentials relative to it.
struct OnlineSoftmax {
  float m_i, l_i;

  DEVICE void add(OnlineSoftmax other) {
    const float larger = fmaxf(m_i, other.m_i);
    l_i = l_i * expf(m_i - larger) + other.l_i * expf(other.m_i - larger);
    m_i = larger;
  }
};

// Load 8 logits of a row plus bias, -inf beyond the last column.
template <bool ALIGNED, class T>
DEVICE void load_logits(const CrossEntropy& a, int64_t index, int column, float (&x)[8]) {
  const int columns = (int)a.vocab_size;
  load_8<ALIGNED>(row<T>(a.logits, index), column, columns, x);
  UNROLL_FOR (int j = 0; j < 8; ++j) x[j] = column + j < columns ? x[j] + widen(a.bias, column + j) : -INFINITY;
}

// Write a row's loss, and to a.softmax [R, 2] its maximum and 1 / sum of exponentials, 0 for ignored rows.
template <class T, bool ALIGNED>
__global__ void __launch_bounds__(LOSS_THREADS) loss_kernel(const CrossEntropy a) {
  SHARED_ARRAY(OnlineSoftmax, warp_softmax, LOSS_THREADS / 32);
  SHARED_ARRAY(int, warp_first, LOSS_THREADS / 32);
  const int64_t index = blockIdx.x, label = a.labels[index];
  const int columns = (int)a.vocab_size;
  const bool in_vocab = label < a.vocab_size;  // a label outside of the vocabulary makes the loss NaN
  const int64_t at = label < 0 || !in_vocab ? 0 : label;
  const float target = in_vocab ? widen(row<T>(a.logits, index)[at]) + widen(a.bias, at) : NAN;
  OnlineSoftmax thread_softmax = {MIN_FLOAT, 0};
  int first = columns;  // the first column that reaches the target: of equal logits argmax takes the first
  for (int column = (int)threadIdx.x * 8; column < columns; column += LOSS_THREADS * 8) {
    float x[8];
    load_logits<ALIGNED, T>(a, index, column, x);
    OnlineSoftmax chunk = {MIN_FLOAT, 0};
    UNROLL_FOR (int j = 0; j < 8; ++j) chunk.m_i = fmaxf(chunk.m_i, x[j]);
    UNROLL_FOR (int j = 0; j < 8; ++j) {
      chunk.l_i += expf(x[j] - chunk.m_i);
      if (x[j] >= target && column + j < first) first = column + j;
    }
    thread_softmax.add(chunk);
  }
  UNROLL_FOR (int lanes = 16; lanes > 0; lanes /= 2) {
    thread_softmax.add(
        {__shfl_xor_sync(~0u, thread_softmax.m_i, lanes), __shfl_xor_sync(~0u, thread_softmax.l_i, lanes)});
    const int other = __shfl_xor_sync(~0u, first, lanes);
    first = other < first ? other : first;
  }
  if (threadIdx.x % 32 == 0) warp_softmax[threadIdx.x / 32] = thread_softmax, warp_first[threadIdx.x / 32] = first;
  __syncthreads();
  if (threadIdx.x != 0) return;
  OnlineSoftmax row_softmax = warp_softmax[0];
  for (int i = 1; i < LOSS_THREADS / 32; ++i) {
    row_softmax.add(warp_softmax[i]);
    first = warp_first[i] < first ? warp_first[i] : first;
  }
  a.losses[index] = label < 0 ? 0.f : row_softmax.m_i - target + logf(row_softmax.l_i);
  a.correct[index] = label >= 0 && first == label && row_softmax.m_i == target;
  a.softmax[2 * index] = row_softmax.m_i, a.softmax[2 * index + 1] = label < 0 ? 0.f : 1.f / row_softmax.l_i;
}

// A vocabulary of BERT's size gives fewer blocks than a GPU has SMs, so one per SM is enough. Without that bound, ptxas
// of CUDA 13.2 and later keeps to 64 registers for a second block, and spills on sm_100 and sm_120.
template <class T, bool ALIGNED>
__global__ void __launch_bounds__(GRADIENT_WARPS * 32, 1) gradient_kernel(const CrossEntropy a) {
  SHARED_ARRAY(float, total, GRADIENT_COLUMNS);
  const int columns = (int)a.vocab_size, warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
  const int column = (int)blockIdx.x * GRADIENT_COLUMNS + lane * 8;
  float sum[8] = {};
  UNROLL_4_FOR (int64_t index = warp; index < a.rows; index += GRADIENT_WARPS) {
    float x[8];
    load_logits<ALIGNED, T>(a, index, column, x);
    const float m_i = a.softmax[2 * index], factor = a.softmax[2 * index + 1];
    const int64_t label = a.labels[index];
    UNROLL_FOR (int j = 0; j < 8; ++j) {
      const float p = factor == 0 ? 0.f : expf(x[j] - m_i) * factor;
      x[j] = column + j == label ? p - 1 : p;
      sum[j] += x[j];
    }
    store_8<ALIGNED>(row<T>(a.logits, index), column, columns, x);
  }
  for (int turn = 0; turn < GRADIENT_WARPS; ++turn) {
    if (warp == turn)
      UNROLL_FOR (int j = 0; j < 8; ++j) total[lane * 8 + j] = sum[j] += turn ? total[lane * 8 + j] : 0;
    __syncthreads();
  }
  if (warp == 0)
    UNROLL_FOR (int j = 0; j < 8; ++j)
      if (column + j < columns) a.d_bias[column + j] += total[lane * 8 + j];
}

void cross_entropy(const CrossEntropy& a, Stream stream) {
  with_type(a.logits.type, [&]<class T>(T) {
    // The stride of the logits is padded, and the padding columns of a row may be written.
    const bool aligned = is_aligned(a.logits, 8) && a.logits.stride >= (a.vocab_size + 7) / 8 * 8;
    launch(aligned ? loss_kernel<T, true> : loss_kernel<T, false>, (int)a.rows, LOSS_THREADS, 0, stream, a);
    if (a.d_bias == nullptr || a.rows == 0) return;
    const int blocks = (int)((a.vocab_size + GRADIENT_COLUMNS - 1) / GRADIENT_COLUMNS);
    launch(aligned ? gradient_kernel<T, true> : gradient_kernel<T, false>, blocks, GRADIENT_WARPS * 32, 0, stream, a);
  });
}

}  // namespace bertfast::cuda
