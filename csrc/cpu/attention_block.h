// Shared by attention's forward and backward pass. Blocks of scores are transposed, [keys, queries], with queries in
// the lanes, so that each lane keeps the row maximum and row sum of its own query.
#pragma once
#include "../attention.h"
#include "block_matmul.h"
#include "parallel.h"
#include "rows.h"
#include "scratch.h"

namespace bertfast::BERTFAST_SET {

constexpr int BLOCK = ATTENTION_BLOCK;

// Of the exponential for probabilities that become operands F: bf16 rounds with a relative error of 2e-3.
template <class F>
constexpr int EXP2_DEGREE = ELEMENTS<F> == 2 ? 4 : 6;

constexpr int KEYS_PER_STEP = REGISTERS == 32 ? 4 : 2;  // of softmax: as many exponentials are interleaved

INLINE int round_up(int count, int multiple) { return (count + multiple - 1) / multiple * multiple; }
INLINE int even(int count) { return round_up(count, 2); }
INLINE int registers(int count) { return (count + LANES - 1) / LANES; }
INLINE int block_at(int first, int end) { return end - first < BLOCK ? end - first : BLOCK; }

// Causal and sliding-window mask.
struct AttentionMask {
  bool causal;
  int window;

  // Range of keys that the queries q_begin … q_end - 1 attend to; begins at a multiple of BLOCK.
  int kv_begin(int q_begin) const { return q_begin > window ? (q_begin - window) / BLOCK * BLOCK : 0; }
  int kv_end(int q_end, int length) const {
    if (causal) return q_end;
    return length - q_end > window ? q_end + window : length;
  }

  // Whether no score of the block is masked.
  bool is_full_block(int query, int queries, int key, int keys) const {
    if (causal && key + keys - 1 > query) return false;
    return query + queries - 1 - key <= window && key + keys - 1 - query <= window;
  }

  // Set masked scores to -inf, and those of the padding keys in the last step.
  void apply(float* scores, int query, int queries, int key, int keys) const {
    const Floats masked = splat(-__builtin_inff());
    for (int row = keys; row < round_up(keys, KEYS_PER_STEP); ++row)
      for (int column = 0; column < queries; column += LANES) store(scores + row * BLOCK + column, masked);
    if (is_full_block(query, queries, key, keys)) return;
    for (int column = 0; column < queries; column += LANES) {
      const Ints q = (Ints)lane_ids() + (query + column);
      for (int row = 0; row < keys; ++row) {
        float* const p = scores + row * BLOCK + column;
        const Ints distance = q - (key + row);
        const Ints attended = (distance <= window) & (distance >= (causal ? 0 : -window));
        store(p, attended ? load(p) : masked);
      }
    }
  }
};

struct Range {
  int begin, end;
};

// Range of keys that a task's queries attend to, within the task's keys.
static inline Range kv_range(const AttentionMask& mask, const AttentionTask& task, int q_begin, int q_end) {
  const int begin = mask.kv_begin(q_begin), end = mask.kv_end(q_end, task.length);
  return {begin > task.kv_begin ? begin : task.kv_begin, end < task.kv_end ? end : task.kv_end};
}

// LANES operands, which are LANES · ELEMENTS<F> adjacent elements of a token's head.
template <class F, class T>
INLINE auto load_operand(const T* p) {
  if constexpr (ELEMENTS<F> == 2) return load((const uint32_t*)p);
  else return load(p);
}

// Pack [count, D], rows `stride` elements apart, as operands [padded, D / ELEMENTS]; rows from `count` on are zero.
template <int D, class F, class T>
static void pack_rows(const T* x, int64_t stride, int count, int padded, F* out) {
  constexpr int WIDTH = D / ELEMENTS<F>;
  for (int row = 0; row < count; ++row)
    UNROLL_FOR (int column = 0; column < WIDTH; column += LANES)
      store(out + row * WIDTH + column, load_operand<F>(x + row * stride + column * ELEMENTS<F>));
  std::memset(out + count * WIDTH, 0, (padded - count) * WIDTH * sizeof(F));
}

// Pack the same as operands [padded / ELEMENTS, D], each a pair of adjacent rows in bf16.
template <int D, class F, class T>
static void pack_stacked(const T* x, int64_t stride, int count, int padded, F* out) {
  if constexpr (ELEMENTS<F> == 1) {
    pack_rows<D>(x, stride, count, padded, out);
  } else {
    for (int row = 0; row < padded; row += 2)
      UNROLL_FOR (int column = 0; column < D; column += LANES) {
        const uint16_t* const p = (const uint16_t*)(x + row * stride + column);
        const Words first = row < count ? load_words(p) : Words{};
        const Words second = row + 1 < count ? load_words(p + stride) : Words{};
        store(out + row / 2 * D + column, first | (second << 16));
      }
  }
}

// Pack the transpose as operands [D / ELEMENTS, BLOCK], in tiles of LANES x LANES; zero from `count` to a multiple of
// LANES.
template <int D, class F, class T>
static void pack_columns(const T* x, int64_t stride, int count, F* out) {
  for (int row = 0; row < count; row += LANES)
    for (int column = 0; column < D / ELEMENTS<F>; column += LANES) {
      Words tile[LANES];
      UNROLL_FOR (int i = 0; i < LANES; ++i)
        tile[i] = row + i < count ? (Words)load_operand<F>(x + (row + i) * stride + column * ELEMENTS<F>) : Words{};
      transpose(tile);
      UNROLL_FOR (int i = 0; i < LANES; ++i) store((uint32_t*)out + (column + i) * BLOCK + row, tile[i]);
    }
}

// Write x [count, D], each row times its factor, in the dtype of `out`.
template <int D, class T>
static void write_rows(const float* x, int count, const float* factors, T* out, int64_t stride) {
  for (int row = 0; row < count; ++row)
    UNROLL_FOR (int column = 0; column < D; column += LANES)
      store(out + row * stride + column, load(x + row * D + column) * factors[row]);
}

// Zero a tensor of `size` bytes from byte `first` on.
static void clear(void* tensor, int64_t first, int64_t size) {
  constexpr int64_t PART = 1 << 16;
  parallel((size - first + PART - 1) / PART, 1, [&](int64_t part, int64_t end) {
    const int64_t from = first + part * PART, to = first + end * PART;
    std::memset((char*)tensor + from, 0, (to < size ? to : size) - from);
  });
}

// Call f(T{}, integral_constant D) with the element type and head dimension.
template <class F>
INLINE void with_shape(const AttentionInputs& a, const F& f) {
  with_type(a.type, [&]<class T>(T x) {
    switch (a.head_dim) {
      case 32: return f(x, std::integral_constant<int, 32>{});
      case 64: return f(x, std::integral_constant<int, 64>{});
      default: return f(x, std::integral_constant<int, 128>{});
    }
  });
}

}  // namespace bertfast::BERTFAST_SET
