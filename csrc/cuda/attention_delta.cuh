// What attention's backward pass needs of each query: the forward pass's lse, and the row sums of d_o · o, which the
// gradient of softmax subtracts from the gradients of the probabilities.
#pragma once
#include "attention.cuh"

namespace bertfast::cuda {

// What the gradient of softmax takes of a query: log2 of the sum of the exponentials of its scores, infinite beyond the
// sequence's end, and delta, divided by the dropout scale. All gradients are multiplied by that scale when they are
// stored.
struct Statistics {
  float lse, delta;

  DEVICE static Statistics of(const AttentionBackward& a, const WorkTile& work, int query) {
    if (query >= work.length) return {INFINITY, 0};
    const int64_t slot = work.head * a.capacity + work.start + query;
    return {a.lse[slot] + log2f((float)work.length), a.delta[slot] * keep_probability(a.dropout.threshold)};
  }
};

// delta = row sum of d_o · o for each token and head.
template <class T, int D>
__global__ void __launch_bounds__(256) delta_kernel(const AttentionBackward a) {
  constexpr int LANES = D / 8;
  const int64_t rows = a.capacity * a.heads, threads = (int64_t)gridDim.x * blockDim.x;
  const int64_t padded_lanes = (rows * LANES + 31) / 32 * 32;  // whole warps, for the shuffle
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < padded_lanes; i += threads) {
    const int64_t row = i / LANES;  // token · heads + head
    float sum = 0, o[8], d_o[8];
    if (row < rows) {
      load_8((const T*)a.o + i * 8, o), load_8((const T*)a.d_o + i * 8, d_o);
      UNROLL_FOR (int j = 0; j < 8; ++j) sum += o[j] * d_o[j];
    }
    UNROLL_FOR (int lanes = LANES / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    if (row < rows && i % LANES == 0) a.delta[row % a.heads * a.capacity + row / a.heads] = sum;
  }
}

}  // namespace bertfast::cuda
