#include "embed.h"

#include "dropout.h"
#include "rows.h"

namespace bertfast::BERTFAST_SET {

// z of a token, the three tables of one type.
template <class W>
INLINE void gather(const Embeddings& tables, int64_t token, int64_t hidden, float* z) {
  const W* const word = row<W>(tables.word, tables.token_ids ? tables.token_ids[token] : token);
  const W* const position = row<W>(tables.position, tables.position_ids[token]);
  const W* const type = row<W>(tables.token_type, tables.token_type_ids[token]);
  across(hidden, [&](int64_t column, int count) {
    store(z + column, load_columns(word + column, count) + load_columns(type + column, count) +
                          load_columns(position + column, count));
  });
}

template <class W, class Y>
static void forward(const EmbedForward& a) {
  const int64_t width = padded(a.hidden);
  parallel(a.tokens, 16, [&](int64_t first, int64_t end) {
    thread_local Scratch floats, masks;
    float* const gamma = floats.room<float>(3 * width);
    float *const beta = gamma + width, *const z = beta + width;
    uint8_t* const bytes = a.dropout.threshold ? masks.room<uint8_t>(width + 16 * LANES) : nullptr;
    widen(a.gamma, a.hidden, gamma), widen(a.beta, a.hidden, beta);
    for (int64_t token = first; token < end; ++token) {
      gather<W>(a.tables, token, a.hidden, z);
      a.rstd[token] = normalise(z, a.hidden, a.eps, &a.mean[token]);
      Y* const y = row<Y>(a.y, token);
      if (!bytes) {
        store_affine(z, gamma, beta, a.hidden, y);
        continue;
      }
      hidden_bytes(a.dropout, token, a.hidden, bytes);
      across(a.hidden, [&](int64_t column, int count) {
        const Floats normal = load(z + column) * load(gamma + column) + load(beta + column);
        store_columns(y + column, normal * factors(bytes + column, a.dropout.threshold), count);
      });
    }
  });
}

template <class W, class Y>
static void backward(const EmbedBackward& a) {
  const int64_t width = padded(a.hidden);
  sum_over_rows(a.tokens, 2, a.hidden, a.sums, [&](int64_t first, int64_t end, float* sums) {
    thread_local Scratch floats, masks;
    float* const gamma = floats.room<float>(4 * width);
    float *const z = gamma + width, *const d_y = z + width, *const d_z = d_y + width;
    uint8_t* const bytes = a.dropout.threshold ? masks.room<uint8_t>(width + 16 * LANES) : nullptr;
    widen(a.gamma, a.hidden, gamma);
    for (int64_t token = first; token < end; ++token) {
      gather<W>(a.tables, token, a.hidden, z);
      if (bytes) hidden_bytes(a.dropout, token, a.hidden, bytes);
      const Y* const given = row<Y>(a.d_y, token);
      across(a.hidden, [&](int64_t column, int count) {
        const Floats d = load_columns(given + column, count);
        store(d_y + column, bytes ? d * factors(bytes + column, a.dropout.threshold) : d);
      });
      differentiate_layer_norm(d_y, z, gamma, a.mean[token], a.rstd[token], a.hidden, d_z, sums, sums + width);
      across(a.hidden, [&](int64_t column, int count) {
        store_columns(a.d_z + token * a.hidden + column, load(d_z + column), count);
      });
    }
  });
}

// Some columns of a row of the table, from the tokens that named it, in their order.
template <class W, int REGISTERS>
INLINE void add_up(const SumByIndex& a, int64_t index, int64_t column, W* out) {
  Floats totals[REGISTERS] = {};
  if (index != a.skipped)
    for (int64_t place = a.starts[index]; place < a.starts[index + 1]; ++place) {
      const float* const d = a.d_z + a.order[place] * a.hidden + column;
      UNROLL for (int i = 0; i < REGISTERS; ++i) totals[i] += load(d + i * LANES);
    }
  UNROLL for (int i = 0; i < REGISTERS; ++i) store(out + column + i * LANES, totals[i]);
}

template <class W>
static void add_up(const SumByIndex& a, int64_t index, int64_t first, int64_t end) {
  constexpr int REGISTERS = 8;
  W* const out = row<W>(a.d_table, index);
  int64_t column = first;
  for (; column + REGISTERS * LANES <= end; column += REGISTERS * LANES) add_up<W, REGISTERS>(a, index, column, out);
  for (; column + LANES <= end; column += LANES) add_up<W, 1>(a, index, column, out);
  for (; column < end; ++column) {
    float total = 0;
    if (index != a.skipped)
      for (int64_t place = a.starts[index]; place < a.starts[index + 1]; ++place)
        total += a.d_z[a.order[place] * a.hidden + column];
    store(out + column, splat(total), 1);
  }
}

template <class W>
static void sum_into(const SumByIndex& a) {
  constexpr int64_t FEW = 1024, BLOCK = 64;  // a table of few rows is shared out by its columns
  if (a.rows < FEW) {
    parallel((a.hidden + BLOCK - 1) / BLOCK, 1, [&](int64_t first, int64_t end) {
      const int64_t last = end * BLOCK < a.hidden ? end * BLOCK : a.hidden;
      for (int64_t index = 0; index < a.rows; ++index) add_up<W>(a, index, first * BLOCK, last);
    });
  } else {
    parallel(a.rows, 64, [&](int64_t first, int64_t end) {
      for (int64_t index = first; index < end; ++index) add_up<W>(a, index, 0, a.hidden);
    });
  }
}

void embed_forward(const EmbedForward& a) {
  with_types(a.tables.word.type, a.y.type, [&]<class W, class Y>(W, Y) { forward<W, Y>(a); });
}

void embed_backward(const EmbedBackward& a) {
  with_types(a.tables.word.type, a.d_y.type, [&]<class W, class Y>(W, Y) { backward<W, Y>(a); });
}

void sum_by_index(const SumByIndex& a) {
  // A counting sort: the tokens of each row together, in their order.
  std::memset(a.starts, 0, (a.rows + 1) * sizeof(int64_t));
  for (int64_t token = 0; token < a.tokens; ++token) ++a.starts[a.index[token] + 1];
  for (int64_t index = 0; index < a.rows; ++index) a.starts[index + 1] += a.starts[index];
  for (int64_t token = 0; token < a.tokens; ++token) a.order[a.starts[a.index[token]]++] = token;
  for (int64_t index = a.rows; index > 0; --index) a.starts[index] = a.starts[index - 1];
  a.starts[0] = 0;
  with_type(a.d_table.type, [&]<class W>(W) { sum_into<W>(a); });
}

}  // namespace bertfast::BERTFAST_SET
