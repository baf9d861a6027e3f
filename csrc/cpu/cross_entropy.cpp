#include "../cross_entropy.h"

#include "rows.h"

namespace bertfast::BERTFAST_SET {

constexpr int64_t BLOCK = 1024;  // columns, which stay in the L1 cache from one pass to the next
constexpr float MIN_FLOAT = -__FLT_MAX__;

INLINE int64_t blocks(int64_t vocab_size) { return (vocab_size + BLOCK - 1) / BLOCK; }

// Return the maximum of a block's logits plus bias; never -inf, since -inf - -inf is NaN.
template <class T>
INLINE float max_logit(const T* logits, const float* bias, int64_t columns) {
  Floats row_max = splat(MIN_FLOAT);
  for_each_vector(columns, [&](int64_t column, int count) {
    Floats logit = load_columns(logits + column, count) + load(bias + column);
    if (count < LANES) logit = lane_ids() < splat((uint32_t)count) ? logit : splat(MIN_FLOAT);
    row_max = maximum(row_max, logit);
  });
  return max_lane(row_max);
}

// Return the sum of exp(logit - block_max) over a block; write each exponential to `out`, which may alias the logits.
template <class T>
INLINE float exponentials(const T* logits, const float* bias, float block_max, int64_t columns, float* out) {
  Floats total{};
  for_each_vector(columns, [&](int64_t column, int count) {
    Floats e = exp2((load_columns(logits + column, count) + load(bias + column) - block_max) * LOG2_E);
    if (count < LANES) e = lane_ids() < splat((uint32_t)count) ? e : splat(0.f);
    if (out != nullptr) store_columns(out + column, e, count);
    total += e;
  });
  return sum(total);
}

struct RowLoss {
  float loss;
  bool correct;
};

// Compute a row's loss. Write its exponentials, relative to the maximum of their own block, to `out` unless it is null;
// `block_max` [blocks] is scratch, and `factor` [blocks] becomes what normalises a block's exponentials.
template <class T>
INLINE RowLoss row_loss(const T* logits, const float* bias, int64_t label, int64_t vocab_size, float* out,
                        float* block_max, float* factor) {
  float row_max = MIN_FLOAT, sum_exp = 0;
  const auto logit = [&](int64_t column) { return load(logits + column, 1)[0] + bias[column]; };
  const float target = label < vocab_size ? logit(label) : __builtin_nanf("");
  bool correct = label < vocab_size;
  const int64_t count = blocks(vocab_size);
  for (int64_t block = 0; block < count; ++block) {
    const int64_t start = block * BLOCK, end = start + BLOCK < vocab_size ? start + BLOCK : vocab_size;
    block_max[block] = max_logit(logits + start, bias + start, end - start);
    if (block_max[block] > target) correct = false;
    if (block_max[block] == target)  // argmax is the first of equal logits
      for (int64_t column = start; column < end && column < label; ++column) correct &= logit(column) != target;
    factor[block] =
        exponentials(logits + start, bias + start, block_max[block], end - start, out ? out + start : nullptr);
    row_max = block_max[block] > row_max ? block_max[block] : row_max;
  }
  for (int64_t block = 0; block < count; ++block) {
    // block_max becomes the factor from the block's maximum to the row's.
    block_max[block] = __builtin_expf(block_max[block] - row_max);
    sum_exp += factor[block] * block_max[block];
  }
  for (int64_t block = 0; block < count; ++block) factor[block] = block_max[block] / sum_exp;
  return {row_max - target + __builtin_logf(sum_exp), correct};
}

// Write the gradient of a row, softmax - onehot(label), from its exponentials, and add it to `sums`.
template <class T>
INLINE void differentiate(const float* exponentials, const float* factors, int64_t label, int64_t vocab_size, T* out,
                          float* sums) {
  const bool in_vocab = label < vocab_size;
  const float at_label = in_vocab ? exponentials[label] * factors[label / BLOCK] - 1 : 0;
  for (int64_t start = 0; start < vocab_size; start += BLOCK) {
    const float factor = factors[start / BLOCK];
    for_each_vector(vocab_size - start < BLOCK ? vocab_size - start : BLOCK, [&](int64_t offset, int count) {
      const int64_t column = start + offset;
      const Floats p = load_columns(exponentials + column, count) * factor;
      store_columns(out + column, p, count);
      store(sums + column, load(sums + column) + p);
    });
  }
  if (in_vocab) store(out + label, splat(at_label), 1), sums[label] -= 1;
}

template <class T>
static void run(const CrossEntropy& a) {
  const int64_t width = padded(a.vocab_size), count = blocks(a.vocab_size);
  // A slot is a range of rows with its own partial sum of d_bias: small enough to balance the threads, large enough
  // that adding the slots is cheap. Slots depend on the number of rows only, so results are the same for any number of
  // threads.
  const int64_t slots = a.rows < 16 ? 1 : a.rows < 512 ? a.rows / 8 : 64;
  static thread_local Scratch vectors, slot_sums;
  float* const bias = vectors.reserve<float>(width);
  float* const sums = slot_sums.reserve<float>(a.d_bias ? slots * width : 1);
  widen(a.bias, a.vocab_size, bias);
  parallel(slots, 1, [&](int64_t first, int64_t end) {
    thread_local Scratch floats;
    float* const row = floats.reserve<float>(width + 2 * count);
    float *const block_max = row + width, *const factor = block_max + count;
    for (int64_t slot = first; slot < end; ++slot) {
      if (a.d_bias) std::memset(sums + slot * width, 0, width * sizeof(float));
      for (int64_t r = a.rows * slot / slots; r < a.rows * (slot + 1) / slots; ++r) {
        T* const logits = (T*)a.logits.data + r * a.logits.stride;
        const int64_t label = a.labels[r];
        a.losses[r] = 0, a.correct[r] = 0;
        if (label < 0) {
          if (a.d_bias) std::memset(logits, 0, a.vocab_size * sizeof(T));
          continue;
        }
        float* const out = a.d_bias == nullptr ? nullptr : a.logits.type == Type::float32 ? (float*)logits : row;
        const RowLoss result = row_loss(logits, bias, label, a.vocab_size, out, block_max, factor);
        a.losses[r] = result.loss, a.correct[r] = result.correct;
        if (a.d_bias) differentiate(out, factor, label, a.vocab_size, logits, sums + slot * width);
      }
    }
  });
  if (a.d_bias == nullptr) return;
  parallel(count, 4, [&](int64_t first, int64_t end) {
    const int64_t columns = end * BLOCK < a.vocab_size ? (end - first) * BLOCK : a.vocab_size - first * BLOCK;
    for_each_vector(columns, [&](int64_t offset, int count) {
      const int64_t column = first * BLOCK + offset;
      Floats total = load_columns(a.d_bias + column, count);
      for (int64_t slot = 0; slot < slots; ++slot) total += load(sums + slot * width + column);
      store_columns(a.d_bias + column, total, count);
    });
  });
}

void cross_entropy(const CrossEntropy& a) {
  with_type(a.logits.type, [&]<class T>(T) { run<T>(a); });
}

}  // namespace bertfast::BERTFAST_SET
