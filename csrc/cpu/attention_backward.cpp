#include "../attention.h"
#include "attention_block.h"
#include "attention_dropout.h"

namespace bertfast::BERTFAST_SET {

// A block's probabilities and score gradients as matmul operands: `rows` for the sums over queries that make d_k and
// d_v (adjacent queries form a bf16 pair), the other for the sum over keys that makes d_q.
template <class F>
struct Gradients {
  F *p_rows, *d_s_rows;  // [keys, BLOCK / ELEMENTS]
  F* d_s;                // [keys / ELEMENTS, BLOCK]
};

// Recompute the probabilities from the scores and lse, and compute d_s = p (d_p - delta).
template <class F, bool DROPOUT>
static void score_gradients(const float* scores, const float* d_p, int keys, int queries, float scale, const float* lse,
                            const float* delta, const DropoutBlock& dropout_mask, int threshold,
                            const Gradients<F>& out) {
  for (int column = 0; column < queries; column += LANES) {
    const Floats lse_i = load(lse + column), delta_i = load(delta + column);
    for (int key = 0; key < keys; key += 2) {
      Floats p[2], d_s[2];
      LaneMask kept[2];
      if constexpr (DROPOUT) dropout_mask.kept(key, column, threshold, kept[0], kept[1]);
      UNROLL_FOR (int i = 0; i < 2; ++i) {
        const int index = (key + i) * BLOCK + column;
        Floats d = load(d_p + index);
        p[i] = exp2(load(scores + index) * scale - lse_i);
        if constexpr (DROPOUT) d = where(kept[i], d);
        d_s[i] = p[i] * (d - delta_i);
        if constexpr (DROPOUT) p[i] = where(kept[i], p[i]);
        if constexpr (ELEMENTS<F> == 2) {
          store((BFloat16*)out.p_rows + index, p[i]);
          store((BFloat16*)out.d_s_rows + index, d_s[i]);
        } else {
          store(out.p_rows + index, p[i]);
          store(out.d_s_rows + index, d_s[i]);
        }
      }
      if constexpr (ELEMENTS<F> == 2) store(out.d_s + key / 2 * BLOCK + column, pack_bf16_pairs(d_s[0], d_s[1]));
    }
  }
}

// Write factor · (row sums of x · y) to out [count rounded up to LANES]: LANES rows at a time, transposed to one lane
// each.
template <int D, class T>
static void dot_rows(const T* x, const T* y, int64_t stride, int count, float factor, float* out) {
  for (int row = 0; row < count; row += LANES) {
    Words sums[LANES];
    UNROLL_FOR (int i = 0; i < LANES; ++i) {
      Floats sum{};
      if (row + i < count)
        for (int column = 0; column < D; column += LANES)
          sum += load(x + (row + i) * stride + column) * load(y + (row + i) * stride + column);
      sums[i] = (Words)sum;
    }
    transpose(sums);
    Floats total{};
    UNROLL_FOR (int i = 0; i < LANES; ++i) total += (Floats)sums[i];
    store(out + row, total * factor);
  }
}

template <class T, int D>
static void differentiate(const AttentionBackward& a, const AttentionTask& task, int head) {
  using F = Operand<T>;
  constexpr int N = ELEMENTS<F>;
  const AttentionMask mask{a.causal, a.window};
  const int mask_begin = mask.kv_begin(task.q_begin), mask_end = mask.kv_end(task.q_end, task.length);
  const int kv_begin = mask_begin > task.kv_begin ? mask_begin : task.kv_begin;
  const int kv_end = mask_end < task.kv_end ? mask_end : task.kv_end;
  const int keys = kv_end - kv_begin, padded = even(keys);
  const T* const query_rows = (const T*)a.qkv + task.start * a.stride + head * D;
  const T* const key_rows = query_rows + a.heads * D + kv_begin * a.stride;
  const int64_t o_stride = a.heads * D, o_start = task.start * o_stride + head * D;

  thread_local Scratch scratch;
  thread_local DropoutBlock dropout_mask;
  float* const scores = scratch.reserve<float>((2 + 3 * (N - 1)) * BLOCK * BLOCK + 5 * BLOCK * D + 5 * padded * D);
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

  const float scale = a.scale * LOG2_E, dropout_scale = 256.f / (256 - a.dropout.threshold);
  // lse is relative to the mean, so the recomputed probabilities are too large by a factor of the length.
  const float inv_length = 1.f / task.length;
  alignas(64) float lse[BLOCK], delta[BLOCK], factors[BLOCK];
  const auto write = [&](const float* x, int count, float factor, int part, int row) {
    for (float& each : factors) each = factor;
    T* const out = (T*)a.d_qkv + (((task.start + row) * 3 + part) * a.heads + head) * D;
    for (int first = 0; first < count; first += BLOCK)
      write_rows<D>(x + first * D, block_at(first, count), factors, out + first * 3 * o_stride, 3 * o_stride);
  };
  for (int query = task.q_begin; query < task.q_end; query += BLOCK) {
    const int queries = block_at(query, task.q_end), columns = registers(queries);
    const int block_begin = mask.kv_begin(query), block_end = mask.kv_end(query + queries, task.length);
    const int begin = block_begin > kv_begin ? block_begin : kv_begin, end = block_end < kv_end ? block_end : kv_end;
    if (begin >= end) continue;
    const T* const q_block = query_rows + query * a.stride;
    const T* const d_o_block = (const T*)a.d_o + o_start + query * o_stride;
    pack_columns<D>(q_block, a.stride, queries, q_columns);
    pack_columns<D>(d_o_block, o_stride, queries, d_o_columns);
    pack_stacked<D>(q_block, a.stride, queries, even(queries), q);
    pack_stacked<D>(d_o_block, o_stride, queries, even(queries), d_o);
    dot_rows<D>(d_o_block, (const T*)a.o + o_start + query * o_stride, o_stride, queries, 1 / dropout_scale, delta);
    std::memset(lse, 0, sizeof lse);
    std::memcpy(lse, a.lse + head * a.capacity + task.start + query, queries * sizeof(float));
    for (int key = begin; key < end; key += BLOCK) {
      const int block_keys = block_at(key, end), row = key - kv_begin;
      matmul<D / N, 1, BLOCK>(k_rows + row * (D / N), q_columns, D / N, scores, even(block_keys), columns, {true});
      matmul<D / N, 1, BLOCK>(v_rows + row * (D / N), d_o_columns, D / N, d_p, even(block_keys), columns, {true});
      mask.apply(scores, query, queries, key, block_keys);
      if (a.dropout.threshold) {
        dropout_mask.draw(a.dropout, task.sequence, head, query, queries, key, block_keys);
        score_gradients<F, true>(scores, d_p, even(block_keys), queries, scale, lse, delta, dropout_mask,
                                 a.dropout.threshold, gradients);
      } else {
        score_gradients<F, false>(scores, d_p, even(block_keys), queries, scale, lse, delta, dropout_mask, 0,
                                  gradients);
      }
      if (task.all_queries()) {
        matmul<BLOCK / N, 1, D>(gradients.p_rows, d_o, (queries + N - 1) / N, d_v + row * D, even(block_keys),
                                D / LANES, {false});
        matmul<BLOCK / N, 1, D>(gradients.d_s_rows, q, (queries + N - 1) / N, d_k + row * D, even(block_keys),
                                D / LANES, {false});
      }
      if (task.all_keys())
        matmul<1, BLOCK, D>(gradients.d_s, k + row / N * D, (block_keys + N - 1) / N, d_q, even(queries), D / LANES,
                            {key == begin});
    }
    if (task.all_keys()) write(d_q, queries, a.scale * dropout_scale * inv_length, 0, query);
  }
  if (task.all_queries()) {
    write(d_k, keys, a.scale * dropout_scale * inv_length, 1, kv_begin);
    write(d_v, keys, dropout_scale * inv_length, 2, kv_begin);
  }
}

void attention_backward(const AttentionBackward& a) {
  with_shape(a, [&]<class T, int D>(T, std::integral_constant<int, D>) {
    const int64_t token = 3 * a.heads * D * sizeof(T);
    clear(a.d_qkv, a.num_tokens * token, a.capacity * token);
    for_each(a.task_count, [&](int64_t index) {
      const AttentionTask& task = a.tasks[index];
      for (int head = task.first_head; head < task.end_head; ++head) differentiate<T, D>(a, task, head);
    });
  });
}

}  // namespace bertfast::BERTFAST_SET
