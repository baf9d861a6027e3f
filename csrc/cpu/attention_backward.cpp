#include "attention_blocks.h"

namespace bertfast::BERTFAST_SET {

// What a thread works with. A block of queries is laid out for each of the five products; so are keys and values.
template <class E>
struct BackwardScratch {
  E *q_columns, *d_o_columns;    // [D][BLOCK]
  E *q_over_rows, *d_o_over_rows;  // [BLOCK][D]
  float *scores, *d_probabilities, *d_q;  // [BLOCK][BLOCK], [BLOCK][BLOCK], [D][BLOCK]
  E *p_rows, *d_s_rows, *d_s_over_rows;   // [key][query], as the products take them
  BlockMask* mask;
  E *k_rows, *v_rows, *k_over_rows;  // [L][D]
  float *d_k, *d_v;                  // [L][D]

  BackwardScratch(Scratch& scratch, int64_t keys_room, int64_t width) {
    const int64_t floats = 5 * width * BLOCK + 5 * BLOCK * BLOCK + 5 * keys_room * width;
    Pieces pieces(scratch.room<char>(floats * sizeof(float) + sizeof(BlockMask) + 16 * 64));
    q_columns = pieces.take<E>(width * BLOCK), d_o_columns = pieces.take<E>(width * BLOCK);
    q_over_rows = pieces.take<E>(width * BLOCK), d_o_over_rows = pieces.take<E>(width * BLOCK);
    scores = pieces.take<float>(BLOCK * BLOCK), d_probabilities = pieces.take<float>(BLOCK * BLOCK);
    d_q = pieces.take<float>(width * BLOCK);
    if constexpr (ELEMENTS<E> == 1) {
      p_rows = scores, d_s_rows = d_s_over_rows = d_probabilities;
    } else {
      p_rows = pieces.take<E>(BLOCK * BLOCK), d_s_rows = pieces.take<E>(BLOCK * BLOCK);
      d_s_over_rows = pieces.take<E>(BLOCK * BLOCK);
    }
    mask = pieces.take<BlockMask>(1);
    k_rows = pieces.take<E>(keys_room * width), v_rows = pieces.take<E>(keys_room * width);
    k_over_rows = ELEMENTS<E> == 1 ? k_rows : pieces.take<E>(keys_room * width);
    d_k = pieces.take<float>(keys_room * width), d_v = pieces.take<float>(keys_room * width);
  }
};

// Of a block: the probabilities, and the gradient of the scores without the factor `scale`, from the scores and the
// gradient of the probabilities [key][query].
template <class E, bool MASKED, bool DROPOUT>
static void differentiate_softmax(const AttentionInput& a, const BackwardScratch<E>& own, int64_t query, int queries,
                                  int64_t key, int keys, int padded, const float* lse, const float* delta) {
  const float scale = a.scale * LOG2_E, kept = 256.f / (256 - a.threshold);
  const Words threshold = splat((uint32_t)a.threshold);
  for (int q = 0; q < queries; q += LANES) {
    const Floats logarithm = load(lse + q), subtracted = load(delta + q);
    for (int k = 0; k < padded; k += 2) {
      Floats p[2], d_s[2];
      Words bytes{};
      if constexpr (DROPOUT) bytes = own.mask->bytes(q, k);
      UNROLL for (int i = 0; i < 2; ++i) {
        p[i] = exp2(load(own.scores + (k + i) * BLOCK + q) * scale - logarithm);
        Floats d_p = load(own.d_probabilities + (k + i) * BLOCK + q);
        if constexpr (MASKED) p[i] = sees(a, query + q, key + k + i) ? p[i] : splat(0.f);
        if (k + i >= keys) p[i] = d_p = Floats{};
        if constexpr (DROPOUT) {
          const auto keep = (i == 0 ? bytes & 0xff : bytes >> 8) >= threshold;
          d_s[i] = p[i] * ((keep ? d_p * kept : splat(0.f)) - subtracted);
          p[i] = keep ? p[i] : splat(0.f);
        } else {
          d_s[i] = p[i] * (d_p - subtracted);
        }
        if constexpr (ELEMENTS<E> == 1) {
          store(own.p_rows + (k + i) * BLOCK + q, p[i]), store(own.d_s_rows + (k + i) * BLOCK + q, d_s[i]);
        } else {
          store((BFloat16*)own.p_rows + (k + i) * BLOCK + q, p[i]);
          store((BFloat16*)own.d_s_rows + (k + i) * BLOCK + q, d_s[i]);
        }
      }
      if constexpr (ELEMENTS<E> == 2) store(own.d_s_over_rows + k / 2 * BLOCK + q, pair(d_s[0], d_s[1]));
    }
  }
}

template <class T, class E>
static void backward(const AttentionBackward& pass, const AttentionTask& task) {
  const AttentionInput& a = pass.input;
  const int width = (int)a.head_dimension, depth = width / ELEMENTS<E>;
  const int64_t start = a.cu_seqlens[task.sequence], length = a.cu_seqlens[task.sequence + 1] - start;
  const int64_t row = a.heads * width, head = task.head * width;
  thread_local Scratch scratch;
  const BackwardScratch<E> own(scratch, rounded_up(task.end_key - task.first_key, BLOCK), width);
  const T* const q = (const T*)a.qkv + start * a.stride + head;
  const T *const k = q + row, *const v = k + row;
  const T *const o = (const T*)pass.o + start * row + head, *const d_o = (const T*)pass.d_o + start * row + head;
  T* const d_qkv = (T*)pass.d_qkv + start * 3 * row + head;
  const int all = (int)(task.end_key - task.first_key), room = rounded_up(all, 8);
  pack_rows(k + task.first_key * a.stride, a.stride, all, room, width, own.k_rows);
  pack_rows(v + task.first_key * a.stride, a.stride, all, room, width, own.v_rows);
  if (ELEMENTS<E> == 2 && task.of_queries)
    pack_over_rows(k + task.first_key * a.stride, a.stride, all, room, width, own.k_over_rows);
  if (task.of_keys) std::memset(own.d_k, 0, room * width * sizeof(float));
  if (task.of_keys) std::memset(own.d_v, 0, room * width * sizeof(float));

  for (int64_t query = task.first_query; query < task.end_query; query += BLOCK) {
    const int queries = (int)(task.end_query - query < BLOCK ? task.end_query - query : BLOCK);
    Range seen = visible(a, query, query + queries, length);
    seen = {seen.first > task.first_key ? seen.first / BLOCK * BLOCK : task.first_key,
            seen.end < task.end_key ? seen.end : task.end_key};
    if (seen.first >= seen.end) continue;
    const int columns = rounded_up(queries, LANES), even = rounded_up(queries, 2);
    const T *const q_block = q + query * a.stride, *const d_o_block = d_o + query * row;
    pack_columns(q_block, a.stride, queries, columns, width, own.q_columns);
    pack_columns(d_o_block, row, queries, columns, width, own.d_o_columns);
    if (task.of_keys) {
      pack_over_rows(q_block, a.stride, queries, even, width, own.q_over_rows);
      pack_over_rows(d_o_block, row, queries, even, width, own.d_o_over_rows);
    }
    if (task.of_queries) std::memset(own.d_q, 0, width * BLOCK * sizeof(float));
    alignas(64) float lse[BLOCK], delta[BLOCK] = {};
    for (int i = 0; i < BLOCK; ++i) {
      // Beyond the last query, probabilities of zero.
      lse[i] = i < queries ? pass.lse[task.head * a.tokens + start + query + i] : __builtin_inff();
      if (i >= queries) continue;
      Floats product{};
      for (int d = 0; d < width; d += LANES)
        product += load(o + (query + i) * row + d) * load(d_o + (query + i) * row + d);
      delta[i] = sum(product);
    }
    for (int64_t key = seen.first; key < seen.end; key += BLOCK) {
      const int64_t place = key - task.first_key;
      const int64_t left = length < task.end_key ? length - key : task.end_key - key;
      const int keys = (int)(left < BLOCK ? left : BLOCK), padded = rounded_up(keys, 8);
      multiply<E, Start::zero>({own.k_rows + place * depth, depth, 1}, padded, depth, own.q_columns, BLOCK, columns,
                               own.scores, BLOCK);
      multiply<E, Start::zero>({own.v_rows + place * depth, depth, 1}, padded, depth, own.d_o_columns, BLOCK, columns,
                               own.d_probabilities, BLOCK);
      if (a.threshold) own.mask->draw(a, task, query, columns, key, padded);
      const bool masked = !sees_all(a, query, queries, key, keys);
      const auto softmax =
          masked ? (a.threshold ? differentiate_softmax<E, true, true> : differentiate_softmax<E, true, false>)
                 : (a.threshold ? differentiate_softmax<E, false, true> : differentiate_softmax<E, false, false>);
      softmax(a, own, query, columns, key, keys, padded, lse, delta);
      if (task.of_keys) {
        constexpr int64_t ROW = BLOCK / ELEMENTS<E>;
        const int over = even / ELEMENTS<E>;
        multiply<E, Start::sum>({own.p_rows, ROW, 1}, padded, over, own.d_o_over_rows, width, width,
                                own.d_v + place * width, width);
        multiply<E, Start::sum>({own.d_s_rows, ROW, 1}, padded, over, own.q_over_rows, width, width,
                                own.d_k + place * width, width);
      }
      if (task.of_queries)
        multiply<E, Start::sum>({own.k_over_rows + place / ELEMENTS<E> * width, 1, width}, width,
                                padded / ELEMENTS<E>, own.d_s_over_rows, BLOCK, columns, own.d_q, BLOCK);
    }
    if (!task.of_queries) continue;
    for (int d = 0; d < width; ++d)
      for (int i = 0; i < columns; i += LANES)
        store(own.d_q + d * BLOCK + i, load(own.d_q + d * BLOCK + i) * a.scale);
    store_transposed(own.d_q, BLOCK, queries, width, d_qkv + query * 3 * row, 3 * row);
  }
  if (!task.of_keys) return;
  const float kept = 256.f / (256 - a.threshold);
  for (int i = 0; i < all; ++i) {
    T *const d_k = d_qkv + (task.first_key + i) * 3 * row + row, *const d_v = d_k + row;
    for (int d = 0; d < width; d += LANES) {
      store(d_k + d, load(own.d_k + i * width + d) * a.scale);
      store(d_v + d, load(own.d_v + i * width + d) * kept);
    }
  }
}

void attention_backward(const AttentionBackward& pass) {
  const AttentionInput& a = pass.input;
  with_elements(a.type, [&]<class T, class E>(T, E) {
    each(a.count, [&](int64_t task) { backward<T, E>(pass, a.tasks[task]); });
    const int64_t used = a.cu_seqlens[a.sequences], row = 3 * a.heads * a.head_dimension;
    std::memset((T*)pass.d_qkv + used * row, 0, (a.tokens - used) * row * sizeof(T));
  });
}

}  // namespace bertfast::BERTFAST_SET
