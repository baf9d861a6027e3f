// What attention's backward pass needs of each query: the forward pass's lse, and the row sums of d_o · o, which the
// gradient of softmax subtracts from the gradients of the probabilities.
#pragma once
#include "attention.cuh"
#include "load_store.cuh"

namespace bertfast::cuda {

// What the gradient of softmax takes of a query: log2 of the sum of the exponentials of its scores, infinite beyond the
// sequence's end, and delta, divided by the dropout scale. All gradients are multiplied by that scale when they are
// stored.
struct Statistics {
  float lse, delta;

  DEVICE static Statistics of(const AttentionBackward& a, const WorkTile& work, int query) {
    if (query >= work.length) return {INFINITY, 0};
    const int64_t slot = slot_of(a, work, query);
    return of(a, work, a.lse[slot], a.delta[slot]);
  }
  DEVICE static Statistics of(const AttentionBackward& a, const WorkTile& work, float lse, float delta) {
    return {lse + log2f((float)work.length), delta * keep_probability(a.dropout.threshold)};
  }
  DEVICE static int64_t slot_of(const AttentionBackward& a, const WorkTile& work, int query) {
    return work.head * a.capacity + work.start + query;
  }
};

// Statistics are written by the assisting warps, a row per thread.
static_assert(ASSISTING_WARPS * 32 == ROWS);

// Computes delta of a step's queries, with o from global memory and d_o from shared memory. LANES lanes sum over a row
// together, PASS_ROWS rows at a time; each lane then owns the sum of another pass.
template <class T, int D>
class StepDelta {
 public:
  static constexpr int LANES = D / 8, PASS_ROWS = 32 / LANES * ASSISTING_WARPS,
                       BATCH = 4;  // passes whose loads are in flight

  DEVICE StepDelta(const AttentionBackward& a, const WorkTile& work, int query) {
    keep_in_registers(thread_);  // so that the compiler does not keep what follows from it for all steps
    o_ = (const T*)a.o + ((work.start + query + first_row()) * a.heads + work.head) * D + lane() * 8;
    stride_ = a.heads * D;
    rows_left_ = work.length - 1 - query - first_row();
  }

  // The row that the calling thread owns.
  DEVICE static int own_row() {
    const int thread = (int)threadIdx.x - 32;
    return thread % LANES * PASS_ROWS + thread / LANES;
  }

  // Load the rows of o of the first passes.
  DEVICE void start() { load(0); }

  // Return the sum of the row that the calling thread owns.
  DEVICE float sum(Tile<ROWS, D>& d_o) {
    static_assert(PASS_ROWS % 8 == 0, "the pattern of a tile repeats every 8 rows");
    const unsigned char* const other = (const unsigned char*)d_o.at(first_row(), lane() * 8);
    float result = 0;
    ROLLED_FOR (int first = 0; first < LANES; first += BATCH) {
      if (first > 0) load(first);
      float sums[BATCH] = {};
      UNROLL_FOR (int i = 0; i < BATCH; ++i) {
        const Words4 x = loaded_[i], y = *(const Words4*)(other + (first + i) * PASS_ROWS * Tile<ROWS, D>::SPAN);
        UNROLL_FOR (int j = 0; j < 8; ++j) sums[i] += element(x, j) * element(y, j);
      }
      const float sum = transposed_sum(sums);
      if (lane() / BATCH * BATCH == first) result = sum;
    }
    return result;
  }

 private:
  // Load o of the rows of BATCH passes; beyond the sequence's end, its last row.
  DEVICE void load(int first) {
    UNROLL_FOR (int i = 0; i < BATCH; ++i) {
      const int rows = (first + i) * PASS_ROWS;
      loaded_[i] = *(const Words4*)(o_ + (rows < rows_left_ ? rows : rows_left_) * stride_);
    }
  }

  // Return the sum of sums[lane() % BATCH] over a row's lanes: lanes first exchange those that the other one returns.
  DEVICE float transposed_sum(float (&sums)[BATCH]) const {
    UNROLL_FOR (int half = BATCH / 2; half > 0; half /= 2) {
      const bool upper = lane() & half;
      UNROLL_FOR (int i = 0; i < half; ++i) {
        const float kept = upper ? sums[i + half] : sums[i], sent = upper ? sums[i] : sums[i + half];
        sums[i] = kept + __shfl_xor_sync(~0u, sent, half);
      }
    }
    UNROLL_FOR (int lanes = BATCH; lanes < LANES; lanes *= 2) sums[0] += __shfl_xor_sync(~0u, sums[0], lanes);
    return sums[0];
  }

  DEVICE static float element(const Words4& x, int i) { return widen(T{(uint16_t)(x.word[i / 2] >> i % 2 * 16)}); }
  DEVICE int lane() const { return (int)(thread_[0] % LANES); }
  DEVICE int first_row() const { return (int)(thread_[0] / LANES); }

  uint32_t thread_[1] = {threadIdx.x - 32};
  const T* o_;
  int stride_;
  int rows_left_;  // from the first one to the sequence's last one
  Words4 loaded_[BATCH];
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
