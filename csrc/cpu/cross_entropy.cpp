#include "../cross_entropy.h"

#include "rows.h"

namespace bertfast::BERTFAST_SET {

constexpr int64_t BLOCK = 1024;  // columns, which stay in the first-level cache from one pass to the next
constexpr float LOWEST = -__FLT_MAX__;

INLINE int64_t blocks(int64_t vocabulary) { return (vocabulary + BLOCK - 1) / BLOCK; }

// The largest of a block's logits with their bias; never -inf, which no logit could be taken from.
template <class T>
INLINE float largest_logit(const T* logits, const float* bias, int64_t columns) {
  Floats most = splat(LOWEST);
  across(columns, [&](int64_t column, int count) {
    Floats logit = load_columns(logits + column, count) + load(bias + column);
    if (count < LANES) logit = lane_numbers() < splat((uint32_t)count) ? logit : splat(LOWEST);
    most = maximum(most, logit);
  });
  return largest(most);
}

// The sum of a block's exp(logit - most); with `out`, which may be the logits' own place, each of them too.
template <class T>
INLINE float exponentials(const T* logits, const float* bias, float most, int64_t columns, float* out) {
  Floats total{};
  across(columns, [&](int64_t column, int count) {
    Floats e = exp2((load_columns(logits + column, count) + load(bias + column) - most) * LOG2_E);
    if (count < LANES) e = lane_numbers() < splat((uint32_t)count) ? e : splat(0.f);
    if (out != nullptr) store_columns(out + column, e, count);
    total += e;
  });
  return sum(total);
}

struct RowLoss {
  float loss;
  bool correct;
};

// With `out` the row's exponentials too, relative to the largest logit of their own block. Of the blocks, [blocks],
// become known the largest logit and what makes the exponentials probabilities.
template <class T>
INLINE RowLoss row_loss(const T* logits, const float* bias, int64_t label, int64_t vocabulary, float* out, float* most,
                        float* factor) {
  float row_most = LOWEST, total = 0;
  const auto logit = [&](int64_t column) { return load(logits + column, 1)[0] + bias[column]; };
  const float target = label < vocabulary ? logit(label) : __builtin_nanf("");
  bool correct = label < vocabulary;
  const int64_t count = blocks(vocabulary);
  for (int64_t block = 0; block < count; ++block) {
    const int64_t start = block * BLOCK, end = start + BLOCK < vocabulary ? start + BLOCK : vocabulary;
    most[block] = largest_logit(logits + start, bias + start, end - start);
    if (most[block] > target) correct = false;
    if (most[block] == target)  // of equal logits the first is the answer
      for (int64_t column = start; column < end && column < label; ++column) correct &= logit(column) != target;
    factor[block] = exponentials(logits + start, bias + start, most[block], end - start, out ? out + start : nullptr);
    row_most = most[block] > row_most ? most[block] : row_most;
  }
  for (int64_t block = 0; block < count; ++block) {
    most[block] = __builtin_expf(most[block] - row_most);
    total += factor[block] * most[block];
  }
  for (int64_t block = 0; block < count; ++block) factor[block] = most[block] / total;
  return {row_most - target + __builtin_logf(total), correct};
}

// The gradient of a row from its exponentials, added to `sums` too.
template <class T>
INLINE void differentiate(const float* exponentials, const float* factors, int64_t label, int64_t vocabulary, T* out,
                          float* sums) {
  const bool there = label < vocabulary;
  const float at_label = there ? exponentials[label] * factors[label / BLOCK] - 1 : 0;
  for (int64_t start = 0; start < vocabulary; start += BLOCK) {
    const float factor = factors[start / BLOCK];
    across(vocabulary - start < BLOCK ? vocabulary - start : BLOCK, [&](int64_t offset, int count) {
      const int64_t column = start + offset;
      const Floats p = load_columns(exponentials + column, count) * factor;
      store_columns(out + column, p, count);
      store(sums + column, load(sums + column) + p);
    });
  }
  if (there) store(out + label, splat(at_label), 1), sums[label] -= 1;
}

template <class T>
static void run(const CrossEntropy& a) {
  const int64_t width = padded(a.vocabulary), count = blocks(a.vocabulary);
  // Few rows a slot, so that the threads' shares are equal; not so few that adding up the slots costs much.
  const int64_t slots = a.rows < 16 ? 1 : a.rows < 512 ? a.rows / 8 : 64;
  static thread_local Scratch vectors, slot_sums;
  float *const bias = vectors.room<float>(width), *const sums = slot_sums.room<float>(a.d_bias ? slots * width : 1);
  widen(a.bias, a.vocabulary, bias);
  parallel(slots, 1, [&](int64_t first, int64_t end) {
    thread_local Scratch floats;
    float* const row = floats.room<float>(width + 2 * count);
    float *const most = row + width, *const factor = most + count;
    for (int64_t slot = first; slot < end; ++slot) {
      if (a.d_bias) std::memset(sums + slot * width, 0, width * sizeof(float));
      for (int64_t r = a.rows * slot / slots; r < a.rows * (slot + 1) / slots; ++r) {
        T* const logits = (T*)a.logits.data + r * a.logits.stride;
        const int64_t label = a.labels[r];
        a.losses[r] = 0, a.correct[r] = 0;
        if (label < 0) {
          if (a.d_bias) std::memset(logits, 0, a.vocabulary * sizeof(T));
          continue;
        }
        float* const out = a.d_bias == nullptr ? nullptr : a.logits.type == Type::float32 ? (float*)logits : row;
        const RowLoss known = row_loss(logits, bias, label, a.vocabulary, out, most, factor);
        a.losses[r] = known.loss, a.correct[r] = known.correct;
        if (a.d_bias) differentiate(out, factor, label, a.vocabulary, logits, sums + slot * width);
      }
    }
  });
  if (a.d_bias == nullptr) return;
  parallel(count, 4, [&](int64_t first, int64_t end) {
    const int64_t columns = end * BLOCK < a.vocabulary ? (end - first) * BLOCK : a.vocabulary - first * BLOCK;
    across(columns, [&](int64_t offset, int some) {
      const int64_t column = first * BLOCK + offset;
      Floats total = load_columns(a.d_bias + column, some);
      for (int64_t slot = 0; slot < slots; ++slot) total += load(sums + slot * width + column);
      store_columns(a.d_bias + column, total, some);
    });
  });
}

void cross_entropy(const CrossEntropy& a) {
  with_type(a.logits.type, [&]<class T>(T) { run<T>(a); });
}

}  // namespace bertfast::BERTFAST_SET
