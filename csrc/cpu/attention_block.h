// What attention's passes share. Blocks of scores are [keys, queries], with the queries in the lanes, so that what is
// known of a query, as the maximum and the sum of its probabilities are, is known lane by lane.
#pragma once
#include "../attention.h"
#include "block_product.h"
#include "parallel.h"
#include "rows.h"
#include "scratch.h"

namespace bertfast::BERTFAST_SET {

constexpr int BLOCK = ATTENTION_BLOCK;

INLINE int even(int count) { return (count + 1) / 2 * 2; }
INLINE int registers(int count) { return (count + LANES - 1) / LANES; }
INLINE int block_at(int first, int end) { return end - first < BLOCK ? end - first : BLOCK; }

// Which keys are seen from where.
struct Sight {
  bool causal;
  int window;

  // The keys for a block of queries: from a block's first on.
  int first_key(int first_query) const { return first_query > window ? (first_query - window) / BLOCK * BLOCK : 0; }
  int end_key(int end_query, int length) const {
    if (causal) return end_query;
    return length - end_query > window ? end_query + window : length;
  }

  bool is_whole(int query, int queries, int key, int keys) const {
    if (causal && key + keys - 1 > query) return false;
    return query + queries - 1 - key <= window && key + keys - 1 - query <= window;
  }

  // The scores of what is not seen become -infinity, as do those of the key that makes their number even.
  void hide(float* scores, int query, int queries, int key, int keys) const {
    const Floats nothing = splat(-__builtin_inff());
    if (keys % 2)
      for (int column = 0; column < queries; column += LANES) store(scores + keys * BLOCK + column, nothing);
    if (is_whole(query, queries, key, keys)) return;
    for (int column = 0; column < queries; column += LANES) {
      const Ints own = (Ints)lane_numbers() + (query + column);
      for (int row = 0; row < keys; ++row) {
        float* const p = scores + row * BLOCK + column;
        const Ints behind = own - (key + row);  // how far the key is
        const Ints seen = (behind <= window) & (behind >= (causal ? 0 : -window));
        store(p, seen ? load(p) : nothing);
      }
    }
  }
};

// A head's part of one token: the factors in LANES · NUMBERS<F> elements.
template <class F, class T>
INLINE auto load_factors(const T* p) {
  if constexpr (NUMBERS<F> == 2) return load((const uint32_t*)p);
  else return load(p);
}

// [count, D] with `stride` elements between rows becomes factors [count, D / NUMBERS], further rows up to `padded` zero.
template <int D, class F, class T>
static void pack_rows(const T* x, int64_t stride, int count, int padded, F* out) {
  constexpr int WIDTH = D / NUMBERS<F>;
  for (int row = 0; row < count; ++row)
    UNROLL for (int column = 0; column < WIDTH; column += LANES)
      store(out + row * WIDTH + column, load_factors<F>(x + row * stride + column * NUMBERS<F>));
  std::memset(out + count * WIDTH, 0, (padded - count) * WIDTH * sizeof(F));
}

// ... becomes factors of neighbouring rows [padded / NUMBERS, D].
template <int D, class F, class T>
static void pack_stacked(const T* x, int64_t stride, int count, int padded, F* out) {
  if constexpr (NUMBERS<F> == 1) {
    pack_rows<D>(x, stride, count, padded, out);
  } else {
    for (int row = 0; row < padded; row += 2)
      UNROLL for (int column = 0; column < D; column += LANES) {
        const uint16_t* const p = (const uint16_t*)(x + row * stride + column);
        const Words first = row < count ? load_words(p) : Words{};
        const Words second = row + 1 < count ? load_words(p + stride) : Words{};
        store(out + row / 2 * D + column, first | (second << 16));
      }
  }
}

// ... becomes its transpose, factors [D / NUMBERS, BLOCK], zero beyond `count` as far as registers reach.
template <int D, class F, class T>
static void pack_columns(const T* x, int64_t stride, int count, F* out) {
  for (int row = 0; row < count; row += LANES)
    for (int column = 0; column < D / NUMBERS<F>; column += LANES) {
      Words tile[LANES];
      UNROLL for (int i = 0; i < LANES; ++i)
        tile[i] = row + i < count ? (Words)load_factors<F>(x + (row + i) * stride + column * NUMBERS<F>) : Words{};
      transpose(tile);
      UNROLL for (int i = 0; i < LANES; ++i) store((uint32_t*)out + (column + i) * BLOCK + row, tile[i]);
    }
}

// Rows [count, D], each times its factor, rounded into a tensor.
template <int D, class T>
static void write_rows(const float* x, int count, const float* factors, T* out, int64_t stride) {
  for (int row = 0; row < count; ++row)
    UNROLL for (int column = 0; column < D; column += LANES)
      store(out + row * stride + column, load(x + row * D + column) * factors[row]);
}

// Zeroes a tensor from `first` bytes on.
static void clear(void* tensor, int64_t first, int64_t size) {
  constexpr int64_t PART = 1 << 16;
  parallel((size - first + PART - 1) / PART, 1, [&](int64_t part, int64_t end) {
    const int64_t from = first + part * PART, to = first + end * PART;
    std::memset((char*)tensor + from, 0, (to < size ? to : size) - from);
  });
}

// f(T{}, D) with the type of a tensor's elements and a constant for its head dimension.
template <class F>
INLINE void with_shape(const AttentionInputs& a, const F& f) {
  with_type(a.type, [&]<class T>(T x) {
    switch (a.head_dimension) {
      case 32: return f(x, std::integral_constant<int, 32>{});
      case 64: return f(x, std::integral_constant<int, 64>{});
      default: return f(x, std::integral_constant<int, 128>{});
    }
  });
}

}  // namespace bertfast::BERTFAST_SET
