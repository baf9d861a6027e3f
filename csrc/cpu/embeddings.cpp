#include "../embeddings.h"

#include "dropout.h"
#include "rows.h"

namespace bertfast::BERTFAST_SET {

// out = position embedding + token-type embedding of a token, in fp32.
static inline void position_and_type(const Embeddings& from, int64_t token, float* out) {
  with_types(from.position.type, from.token_type.type, [&]<class P, class Y>(P, Y) {
    const P* const position = row<P>(from.position, from.position_ids[token]);
    const Y* const type = row<Y>(from.token_type, from.token_type_ids[token]);
    for_each_vector(from.hidden, [&](int64_t column, int count) {
      store(out + column, load_columns(type + column, count) + load_columns(position + column, count));
    });
  });
}

template <class W>
INLINE const W* word(const Embeddings& from, int64_t token) {
  return row<W>(from.word, from.token_ids ? from.token_ids[token] : token);
}

template <class W>
static void forward(const EmbeddingsForward& a) {
  const int64_t hidden = a.from.hidden, width = padded(hidden);
  parallel(a.from.tokens, 16, [&](int64_t first, int64_t end) {
    thread_local Scratch floats, bytes;
    HiddenMask mask(a.dropout, hidden, bytes);
    float* const gamma = floats.reserve<float>(3 * width);
    float *const beta = gamma + width, *const z = beta + width;
    widen(a.gamma, hidden, gamma), widen(a.beta, hidden, beta);
    for (int64_t token = first; token < end; ++token) {
      const W* const word_row = word<W>(a.from, token);
      W* const y = row<W>(a.y, token);
      mask.draw(token);
      position_and_type(a.from, token, z);
      const LayerNorm norm = statistics(hidden, a.eps, z, [&](int64_t column, int count) {
        return load_columns(word_row + column, count) + load(z + column);
      });
      for_each_vector(hidden, [&](int64_t column, int count) {
        const Floats normal = norm(load(z + column)) * load(gamma + column) + load(beta + column);
        store_columns(y + column, mask(column, normal), count);
      });
      a.mean[token] = norm.mean, a.rstd[token] = norm.rstd;
    }
  });
}

template <class W, class Z>
static void backward(const EmbeddingsBackward& a) {
  const int64_t hidden = a.from.hidden, width = padded(hidden);
  sum_over_rows<2>(a.from.tokens, hidden, a.sums, [&](int64_t first, int64_t end, float* sums) {
    thread_local Scratch floats, bytes;
    HiddenMask mask(a.dropout, hidden, bytes);
    float* const gamma = floats.reserve<float>(4 * width);
    float *const others = gamma + width, *const buffer = others + width;
    widen(a.gamma, hidden, gamma);
    for (int64_t token = first; token < end; ++token) {
      const W *const word_row = word<W>(a.from, token), *const d_y = row<W>(a.d_y, token);
      Z* const d_z = row<Z>(a.d_z, token);
      mask.draw(token);
      position_and_type(a.from, token, others);
      differentiate(
          LayerNorm{a.mean[token], a.rstd[token]}, hidden, gamma, sums, sums + width, buffer,
          [&](int64_t column, int count) { return load_columns(word_row + column, count) + load(others + column); },
          [&](int64_t column, int count) { return mask(column, load_columns(d_y + column, count)); },
          [&](int64_t column, int count, Floats d) { store_columns(d_z + column, d, count); });
    }
  });
}

// If many values share an index, several threads must sum them: every full piece of PIECE sorted positions with equal
// indices is summed first. Pieces do not overlap, so position / PIECE of a piece's begin is unique and numbers its sum.
constexpr int64_t PIECE = 128;

// The values sorted by index (stable counting sort): those of row r are value[begin[r]] … value[begin[r + 1] - 1].
struct Order {
  int64_t *begin, *value;
  int64_t *piece, pieces;  // sorted position at which each piece begins, and their number
};

static inline Order sort(const SumByIndex& a, Scratch& memory) {
  int64_t* const begin = memory.reserve<int64_t>(a.rows + 2 + a.count + a.count / PIECE);
  Order sorted{begin, begin + a.rows + 2, begin + a.rows + 2 + a.count, 0};
  std::memset(begin, 0, (a.rows + 2) * sizeof(int64_t));
  for (int64_t i = 0; i < a.count; ++i)
    if (a.index[i] != a.zero_row) ++begin[a.index[i] + 2];
  for (int64_t row = 0; row < a.rows; ++row) begin[row + 2] += begin[row + 1];
  for (int64_t i = 0; i < a.count; ++i)
    if (a.index[i] != a.zero_row) sorted.value[begin[a.index[i] + 1]++] = i;
  for (int64_t row = 0; row < a.rows; ++row)
    for (int64_t position = begin[row]; position + PIECE <= begin[row + 1]; position += PIECE)
      sorted.piece[sorted.pieces++] = position;
  return sorted;
}

template <class V, class T>
static void sum(const SumByIndex& a) {
  static thread_local Scratch indices, floats;
  const Order sorted = sort(a, indices);
  const int64_t width = padded(a.hidden);
  float* const pieces = floats.reserve<float>((a.count / PIECE + 1) * width);
  const auto add_values = [&](int64_t first, int64_t end, float* total) {
    for (int64_t position = first; position < end; ++position) {
      const V* const value = row<V>(a.values, sorted.value[position]);
      for_each_vector(a.hidden,
                      [&](int64_t column, int count) { add_to(total + column, load_columns(value + column, count)); });
    }
  };
  for_each(sorted.pieces, [&](int64_t index) {
    const int64_t position = sorted.piece[index];
    float* const total = pieces + position / PIECE * width;
    std::memset(total, 0, width * sizeof(float));
    add_values(position, position + PIECE, total);
  });
  constexpr int64_t BLOCK = 16;
  for_each((a.rows + BLOCK - 1) / BLOCK, [&](int64_t block) {
    thread_local Scratch memory;
    float* const total = memory.reserve<float>(width);
    for (int64_t index = block * BLOCK; index < a.rows && index < (block + 1) * BLOCK; ++index) {
      int64_t position = sorted.begin[index];
      const int64_t end = sorted.begin[index + 1];
      T* const out = row<T>(a.table, index);
      if (position == end) {  // not by memset, which takes twice the time for rows of a few kilobytes
        for_each_vector(a.hidden, [&](int64_t column, int count) { store_columns(out + column, Floats{}, count); });
        continue;
      }
      std::memset(total, 0, width * sizeof(float));
      for (; position + PIECE <= end; position += PIECE)
        for_each_vector(width, [&](int64_t column, int) {
          add_to(total + column, load(pieces + position / PIECE * width + column));
        });
      add_values(position, end, total);
      for_each_vector(a.hidden,
                      [&](int64_t column, int count) { store_columns(out + column, load(total + column), count); });
    }
  });
}

void embeddings_forward(const EmbeddingsForward& a) {
  with_type(a.y.type, [&]<class W>(W) { forward<W>(a); });
}

void embeddings_backward(const EmbeddingsBackward& a) {
  with_types(a.d_y.type, a.d_z.type, [&]<class W, class Z>(W, Z) { backward<W, Z>(a); });
}

void sum_by_index(const SumByIndex& a) {
  with_types(a.values.type, a.table.type, [&]<class V, class T>(V, T) { sum<V, T>(a); });
}

}  // namespace bertfast::BERTFAST_SET
