#include "../embed.h"

#include "dropout.h"
#include "rows.h"

namespace bertfast::BERTFAST_SET {

// What is added to a token's word.
static inline void position_and_type(const Embeddings& from, int64_t token, float* out) {
  with_types(from.position.type, from.token_type.type, [&]<class P, class Y>(P, Y) {
    const P* const position = row<P>(from.position, from.position_ids[token]);
    const Y* const type = row<Y>(from.token_type, from.token_type_ids[token]);
    across(from.hidden, [&](int64_t column, int count) {
      store(out + column, load_columns(type + column, count) + load_columns(position + column, count));
    });
  });
}

template <class W>
INLINE const W* word(const Embeddings& from, int64_t token) {
  return row<W>(from.word, from.token_ids ? from.token_ids[token] : token);
}

template <class W>
static void forward(const EmbedForward& a) {
  const int64_t hidden = a.from.hidden, width = padded(hidden);
  parallel(a.from.tokens, 16, [&](int64_t first, int64_t end) {
    thread_local Scratch floats, bytes;
    HiddenMask mask(a.dropout, hidden, bytes);
    float* const gamma = floats.room<float>(3 * width);
    float *const beta = gamma + width, *const z = beta + width;
    widen(a.gamma, hidden, gamma), widen(a.beta, hidden, beta);
    for (int64_t token = first; token < end; ++token) {
      const W* const words = word<W>(a.from, token);
      W* const y = row<W>(a.y, token);
      mask.draw(token);
      position_and_type(a.from, token, z);
      const LayerNorm norm = statistics(hidden, a.eps, z, [&](int64_t column, int count) {
        return load_columns(words + column, count) + load(z + column);
      });
      across(hidden, [&](int64_t column, int count) {
        const Floats normal = norm(load(z + column)) * load(gamma + column) + load(beta + column);
        store_columns(y + column, mask(column, normal), count);
      });
      a.mean[token] = norm.mean, a.rstd[token] = norm.rstd;
    }
  });
}

template <class W, class Z>
static void backward(const EmbedBackward& a) {
  const int64_t hidden = a.from.hidden, width = padded(hidden);
  sum_over_rows<2>(a.from.tokens, hidden, a.sums, [&](int64_t first, int64_t end, float* sums) {
    thread_local Scratch floats, bytes;
    HiddenMask mask(a.dropout, hidden, bytes);
    float* const gamma = floats.room<float>(4 * width);
    float *const others = gamma + width, *const room = others + width;
    widen(a.gamma, hidden, gamma);
    for (int64_t token = first; token < end; ++token) {
      const W *const words = word<W>(a.from, token), *const d_y = row<W>(a.d_y, token);
      Z* const d_z = row<Z>(a.d_z, token);
      mask.draw(token);
      position_and_type(a.from, token, others);
      differentiate(
          LayerNorm{a.mean[token], a.rstd[token]}, hidden, gamma, sums, sums + width, room,
          [&](int64_t column, int count) { return load_columns(words + column, count) + load(others + column); },
          [&](int64_t column, int count) { return mask(column, load_columns(d_y + column, count)); },
          [&](int64_t column, int count, Floats d) { store_columns(d_z + column, d, count); });
    }
  });
}

// Many rows may share an index, and then more than one thread must sum them: every full PIECE of a run of equal indices
// is summed first. Pieces do not overlap, so that the place / PIECE where one begins is its own.
constexpr int64_t PIECE = 128;

// The values in the order of their indices, equal ones in the order they have: those of row r have the places begin[r]
// to begin[r + 1].
struct Order {
  int64_t *begin, *value;
  int64_t *piece, pieces;  // where each piece begins
};

static inline Order sort(const SumByIndex& a, Scratch& memory) {
  int64_t* const begin = memory.room<int64_t>(a.rows + 2 + a.count + a.count / PIECE);
  Order sorted{begin, begin + a.rows + 2, begin + a.rows + 2 + a.count, 0};
  std::memset(begin, 0, (a.rows + 2) * sizeof(int64_t));
  for (int64_t i = 0; i < a.count; ++i)
    if (a.index[i] != a.left_out) ++begin[a.index[i] + 2];
  for (int64_t row = 0; row < a.rows; ++row) begin[row + 2] += begin[row + 1];
  for (int64_t i = 0; i < a.count; ++i)
    if (a.index[i] != a.left_out) sorted.value[begin[a.index[i] + 1]++] = i;
  for (int64_t row = 0; row < a.rows; ++row)
    for (int64_t place = begin[row]; place + PIECE <= begin[row + 1]; place += PIECE)
      sorted.piece[sorted.pieces++] = place;
  return sorted;
}

template <class V, class T>
static void sum(const SumByIndex& a) {
  static thread_local Scratch indices, floats;
  const Order sorted = sort(a, indices);
  const int64_t width = padded(a.hidden);
  float* const pieces = floats.room<float>((a.count / PIECE + 1) * width);
  const auto add_values = [&](int64_t first, int64_t end, float* total) {
    for (int64_t place = first; place < end; ++place) {
      const V* const value = row<V>(a.values, sorted.value[place]);
      across(a.hidden, [&](int64_t column, int count) { add_to(total + column, load_columns(value + column, count)); });
    }
  };
  each(sorted.pieces, [&](int64_t number) {
    const int64_t place = sorted.piece[number];
    float* const total = pieces + place / PIECE * width;
    std::memset(total, 0, width * sizeof(float));
    add_values(place, place + PIECE, total);
  });
  constexpr int64_t BLOCK = 16;
  each((a.rows + BLOCK - 1) / BLOCK, [&](int64_t block) {
    thread_local Scratch memory;
    float* const total = memory.room<float>(width);
    for (int64_t number = block * BLOCK; number < a.rows && number < (block + 1) * BLOCK; ++number) {
      int64_t place = sorted.begin[number];
      const int64_t end = sorted.begin[number + 1];
      T* const out = row<T>(a.table, number);
      if (place == end) {
        std::memset(out, 0, a.hidden * sizeof(T));
        continue;
      }
      std::memset(total, 0, width * sizeof(float));
      for (; place + PIECE <= end; place += PIECE)
        across(width, [&](int64_t column, int) { add_to(total + column, load(pieces + place / PIECE * width + column)); });
      add_values(place, end, total);
      across(a.hidden, [&](int64_t column, int count) { store_columns(out + column, load(total + column), count); });
    }
  });
}

void embed_forward(const EmbedForward& a) {
  with_type(a.y.type, [&]<class W>(W) { forward<W>(a); });
}

void embed_backward(const EmbedBackward& a) {
  with_types(a.d_y.type, a.d_z.type, [&]<class W, class Z>(W, Z) { backward<W, Z>(a); });
}

void sum_by_index(const SumByIndex& a) {
  with_types(a.values.type, a.table.type, [&]<class V, class T>(V, T) { sum<V, T>(a); });
}

}  // namespace bertfast::BERTFAST_SET
