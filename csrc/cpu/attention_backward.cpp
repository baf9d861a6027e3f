#include "../attention.h"
#include "attention_block.h"
#include "attention_dropout.h"

namespace bertfast::BERTFAST_SET {

// A block's probabilities and the gradients of its scores, as factors of products that add over queries (`rows`, where
// neighbouring queries stand together), or over keys.
template <class F>
struct Gradients {
  F *p_rows, *d_s_rows;  // [keys, BLOCK / NUMBERS]
  F* d_s;                // [keys / NUMBERS, BLOCK]
};

template <class F, bool DROPOUT>
static void differentiate(const float* scores, const float* d_p, int keys, int queries, float scale, const float* lse,
                          const float* delta, const DropoutBlock& mask, int threshold, const Gradients<F>& out) {
  for (int column = 0; column < queries; column += LANES) {
    const Floats own_lse = load(lse + column), own_delta = load(delta + column);
    for (int key = 0; key < keys; key += 2) {
      Floats p[2], d_s[2];
      Mask kept[2];
      if constexpr (DROPOUT) mask.kept(key, column, threshold, kept[0], kept[1]);
      UNROLL for (int i = 0; i < 2; ++i) {
        const int place = (key + i) * BLOCK + column;
        Floats d = load(d_p + place);
        p[i] = exp2(load(scores + place) * scale - own_lse);
        if constexpr (DROPOUT) d = where(kept[i], d);
        d_s[i] = p[i] * (d - own_delta);
        if constexpr (DROPOUT) p[i] = where(kept[i], p[i]);
        if constexpr (NUMBERS<F> == 2) {
          store((BFloat16*)out.p_rows + place, p[i]);
          store((BFloat16*)out.d_s_rows + place, d_s[i]);
        } else {
          store(out.p_rows + place, p[i]);
          store(out.d_s_rows + place, d_s[i]);
        }
      }
      if constexpr (NUMBERS<F> == 2) store(out.d_s + key / 2 * BLOCK + column, join(d_s[0], d_s[1]));
    }
  }
}

// The sums of d_o · o, a lane each, times a factor.
template <int D, class T>
static void dot_rows(const T* x, const T* y, int64_t stride, int count, float factor, float* out) {
  for (int row = 0; row < count; row += LANES) {
    Words sums[LANES];
    UNROLL for (int i = 0; i < LANES; ++i) {
      Floats sum{};
      if (row + i < count)
        for (int column = 0; column < D; column += LANES)
          sum += load(x + (row + i) * stride + column) * load(y + (row + i) * stride + column);
      sums[i] = (Words)sum;
    }
    transpose(sums);
    Floats total{};
    UNROLL for (int i = 0; i < LANES; ++i) total += (Floats)sums[i];
    store(out + row, total * factor);
  }
}

template <class T, int D>
static void differentiate(const AttentionBackward& a, const AttentionTask& task, int head) {
  using F = Factor<T>;
  constexpr int N = NUMBERS<F>;
  const Sight sight{a.causal, a.window};
  const int seen = sight.first_key(task.first_query), end_seen = sight.end_key(task.end_query, task.length);
  const int first_key = seen > task.first_key ? seen : task.first_key;
  const int end_key = end_seen < task.end_key ? end_seen : task.end_key;
  const int keys = end_key - first_key, padded = even(keys);
  const T* const query_rows = (const T*)a.qkv + task.start * a.stride + head * D;
  const T* const key_rows = query_rows + a.heads * D + first_key * a.stride;
  const int64_t o_stride = a.heads * D, o_start = task.start * o_stride + head * D;

  thread_local Scratch scratch;
  thread_local DropoutBlock mask;
  float* const scores = scratch.room<float>((2 + 3 * (N - 1)) * BLOCK * BLOCK + 5 * BLOCK * D + 5 * padded * D);
  float *const d_p = scores + BLOCK * BLOCK, *const d_q = d_p + BLOCK * BLOCK, *const d_k = d_q + BLOCK * D;
  float* const d_v = d_k + padded * D;
  F *const q_columns = (F*)(d_v + padded * D), *const d_o_columns = q_columns + BLOCK * D;
  F *const q = d_o_columns + BLOCK * D, *const d_o = q + BLOCK * D;
  F *const k_rows = d_o + BLOCK * D, *const v_rows = k_rows + padded * D, *k = k_rows;
  Gradients<F> gradients{(F*)scores, (F*)d_p, (F*)d_p};
  pack_rows<D>(key_rows, a.stride, keys, padded, k_rows);
  pack_rows<D>(key_rows + a.heads * D, a.stride, keys, padded, v_rows);
  if constexpr (N == 2) {
    k = v_rows + padded * D;
    pack_stacked<D>(key_rows, a.stride, keys, padded, k);
    gradients.p_rows = k + padded * D;
    gradients.d_s_rows = gradients.p_rows + BLOCK * BLOCK;
    gradients.d_s = gradients.d_s_rows + BLOCK * BLOCK;
  }
  std::memset(d_k, 0, 2 * padded * D * sizeof(float));

  const float scale = a.scale * LOG2_E, kept = 256.f / (256 - a.dropout.threshold);
  const float share = 1.f / task.length;  // of the probabilities, which are made relative to their mean
  alignas(64) float lse[BLOCK], delta[BLOCK], factors[BLOCK];
  const auto write = [&](const float* x, int count, float factor, int part, int row) {
    for (float& each : factors) each = factor;
    T* const out = (T*)a.d_qkv + (((task.start + row) * 3 + part) * a.heads + head) * D;
    for (int first = 0; first < count; first += BLOCK)
      write_rows<D>(x + first * D, block_at(first, count), factors, out + first * 3 * o_stride, 3 * o_stride);
  };
  for (int query = task.first_query; query < task.end_query; query += BLOCK) {
    const int queries = block_at(query, task.end_query), columns = registers(queries);
    const int visible = sight.first_key(query), end_visible = sight.end_key(query + queries, task.length);
    const int begin = visible > first_key ? visible : first_key, end = end_visible < end_key ? end_visible : end_key;
    if (begin >= end) continue;
    const T *const own_q = query_rows + query * a.stride, *const own_d_o = (const T*)a.d_o + o_start + query * o_stride;
    pack_columns<D>(own_q, a.stride, queries, q_columns);
    pack_columns<D>(own_d_o, o_stride, queries, d_o_columns);
    pack_stacked<D>(own_q, a.stride, queries, even(queries), q);
    pack_stacked<D>(own_d_o, o_stride, queries, even(queries), d_o);
    dot_rows<D>(own_d_o, (const T*)a.o + o_start + query * o_stride, o_stride, queries, 1 / kept, delta);
    std::memset(lse, 0, sizeof lse);
    std::memcpy(lse, a.lse + head * a.tokens + task.start + query, queries * sizeof(float));
    for (int key = begin; key < end; key += BLOCK) {
      const int some = block_at(key, end), place = key - first_key;
      product<D / N, 1, BLOCK>(k_rows + place * (D / N), q_columns, D / N, scores, even(some), columns, {true});
      product<D / N, 1, BLOCK>(v_rows + place * (D / N), d_o_columns, D / N, d_p, even(some), columns, {true});
      sight.hide(scores, query, queries, key, some);
      if (a.dropout.threshold) {
        mask.draw(a.dropout, task.sequence, head, query, queries, key, some);
        differentiate<F, true>(scores, d_p, even(some), queries, scale, lse, delta, mask, a.dropout.threshold,
                               gradients);
      } else {
        differentiate<F, false>(scores, d_p, even(some), queries, scale, lse, delta, mask, 0, gradients);
      }
      if (task.all_queries()) {
        product<BLOCK / N, 1, D>(gradients.p_rows, d_o, (queries + N - 1) / N, d_v + place * D, even(some), D / LANES,
                                 {false});
        product<BLOCK / N, 1, D>(gradients.d_s_rows, q, (queries + N - 1) / N, d_k + place * D, even(some), D / LANES,
                                 {false});
      }
      if (task.all_keys())
        product<1, BLOCK, D>(gradients.d_s, k + place / N * D, (some + N - 1) / N, d_q, even(queries), D / LANES,
                             {key == begin});
    }
    if (task.all_keys()) write(d_q, queries, a.scale * kept * share, 0, query);
  }
  if (task.all_queries()) {
    write(d_k, keys, a.scale * kept * share, 1, first_key);
    write(d_v, keys, kept * share, 2, first_key);
  }
}

void attention_backward(const AttentionBackward& a) {
  with_shape(a, [&]<class T, int D>(T, std::integral_constant<int, D>) {
    const int64_t token = 3 * a.heads * D * sizeof(T);
    clear(a.d_qkv, a.used * token, a.tokens * token);
    each(a.task_count, [&](int64_t index) {
      const AttentionTask& task = a.tasks[index];
      for (int head = task.first_head; head < task.end_head; ++head) differentiate<T, D>(a, task, head);
    });
  });
}

}  // namespace bertfast::BERTFAST_SET
