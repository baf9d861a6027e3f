#include "../attention.h"
#include "attention_block.h"
#include "attention_dropout.h"
#include "attention_prefetch.h"

namespace bertfast::BERTFAST_SET {

// A block's probabilities and score gradients as matmul operands: `rows` for the sums over queries that make d_k and
// d_v (adjacent queries form a bf16 pair), the other for the sum over keys that makes d_q.
template <class F>
struct Gradients {
  F *p_rows, *d_s_rows;  // [keys, BLOCK / ELEMENTS]
  F* d_s;                // [keys / ELEMENTS, BLOCK]
};

// Recompute the probabilities from the scores and lse, and compute d_s = p (d_p - delta). The keys are rounded up to
// whole steps; what the additional rows get is not read.
template <class F, bool DROPOUT>
static void score_gradients(const float* scores, const float* d_p, int keys, int queries, float scale, const float* lse,
                            const float* delta, const DropoutBlock& dropout_mask, int threshold,
                            const Gradients<F>& out) {
  constexpr int STEP = KEYS_PER_STEP;
  for (int column = 0; column < queries; column += LANES) {
    const Floats lse_i = load(lse + column), delta_i = load(delta + column);
    for (int key = 0; key < keys; key += STEP) {
      Floats p[STEP], d_s[STEP];
      LaneMask kept[STEP];
      if constexpr (DROPOUT)
        UNROLL_FOR (int i = 0; i < STEP; i += 2) dropout_mask.kept(key + i, column, threshold, kept[i], kept[i + 1]);
      UNROLL_FOR (int i = 0; i < STEP; ++i) p[i] = load(scores + (key + i) * BLOCK + column) * scale - lse_i;
      exp2<EXP2_DEGREE<F>>(p);
      UNROLL_FOR (int i = 0; i < STEP; ++i) {
        const int index = (key + i) * BLOCK + column;
        Floats d = load(d_p + index);
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
      if constexpr (ELEMENTS<F> == 2)
        UNROLL_FOR (int i = 0; i < STEP; i += 2)
          store(out.d_s + (key + i) / 2 * BLOCK + column, pack_bf16_pairs(d_s[i], d_s[i + 1]));
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

// The scratch memory of a task: keys and values packed once, queries packed per block, and the gradients so far.
template <class T, int D>
struct BackwardBuffers {
  using F = Operand<T>;
  float *scores, *d_p, *d_q, *d_k, *d_v;                       // [keys, queries] twice; [queries, D]; [keys, D] twice
  F *q_columns, *d_o_columns, *q, *d_o, *k_rows, *v_rows, *k;  // operands, packed as their names say
  Gradients<F> gradients;

  [[gnu::always_inline]] BackwardBuffers(Scratch& scratch, const T* key_rows, const T* value_rows, int64_t stride,
                                         int keys) {
    constexpr int N = ELEMENTS<F>;
    const int padded = even(keys);
    scores = scratch.reserve<float>((2 + 3 * (N - 1)) * BLOCK * BLOCK + 5 * BLOCK * D + 5 * padded * D);
    d_p = scores + BLOCK * BLOCK, d_q = d_p + BLOCK * BLOCK, d_k = d_q + BLOCK * D, d_v = d_k + padded * D;
    q_columns = (F*)(d_v + padded * D), d_o_columns = q_columns + BLOCK * D;
    q = d_o_columns + BLOCK * D, d_o = q + BLOCK * D;
    k_rows = d_o + BLOCK * D, v_rows = k_rows + padded * D, k = k_rows;
    gradients = {(F*)scores, (F*)d_p, (F*)d_p};  // in fp32 they replace scores and d_p
    pack_rows<D>(key_rows, stride, keys, padded, k_rows);
    pack_rows<D>(value_rows, stride, keys, padded, v_rows);
    if constexpr (N == 2) {
      k = v_rows + padded * D;
      pack_stacked<D>(key_rows, stride, keys, padded, k);
      gradients.p_rows = k + padded * D;
      gradients.d_s_rows = gradients.p_rows + BLOCK * BLOCK;
      gradients.d_s = gradients.d_s_rows + BLOCK * BLOCK;
    }
    std::memset(d_k, 0, 2 * padded * D * sizeof(float));
  }

  [[gnu::always_inline]] void pack_queries(const T* q_rows, int64_t q_stride, const T* d_o_rows, int64_t o_stride,
                                           int queries) const {
    pack_columns<D>(q_rows, q_stride, queries, q_columns);
    pack_columns<D>(d_o_rows, o_stride, queries, d_o_columns);
    pack_stacked<D>(q_rows, q_stride, queries, even(queries), q);
    pack_stacked<D>(d_o_rows, o_stride, queries, even(queries), d_o);
  }
};

// Write x [count, D] times a factor to the tokens from `token` on of part 0 (d_q), 1 (d_k) or 2 (d_v) of d_qkv.
template <int D, class T>
static void write_gradient(const AttentionBackward& a, const float* x, int count, float factor, int part, int head,
                           int64_t token) {
  alignas(64) float factors[BLOCK];
  for (float& each : factors) each = factor;
  const int64_t stride = 3 * a.heads * D;
  T* const out = (T*)a.d_qkv + ((token * 3 + part) * a.heads + head) * D;
  for (int first = 0; first < count; first += BLOCK)
    write_rows<D>(x + first * D, block_at(first, count), factors, out + first * stride, stride);
}

// The rows that a task reads and writes for a head; none without a task.
template <class T, int D>
static RowPrefetch<T, D> rows_of_head(const AttentionBackward& a, const AttentionTask* task, int head) {
  RowPrefetch<T, D> rows;
  if (task == nullptr) return rows;
  const Range keys = kv_range({a.causal, a.window}, *task, task->q_begin, task->q_end);
  const int64_t part = a.heads * D, query = task->start + task->q_begin, key = task->start + keys.begin;
  const int q_count = task->q_end - task->q_begin, kv_count = keys.end - keys.begin;
  rows.add((const T*)a.qkv + query * a.stride + head * D, a.stride, q_count);
  rows.add((const T*)a.qkv + key * a.stride + part + head * D, a.stride, kv_count, 2, part);
  rows.add((const T*)a.d_o + query * part + head * D, part, q_count);
  rows.add((const T*)a.o + query * part + head * D, part, q_count);
  if (task->all_keys()) rows.add((const T*)a.d_qkv + query * 3 * part + head * D, 3 * part, q_count);
  if (task->all_queries()) rows.add((const T*)a.d_qkv + key * 3 * part + part + head * D, 3 * part, kv_count, 2, part);
  return rows;
}

template <class T, int D>
static void differentiate(const AttentionBackward& a, const AttentionTask& task, int head,
                          RowPrefetch<T, D> next_rows) {
  using F = Operand<T>;
  constexpr int N = ELEMENTS<F>;
  const AttentionMask mask{a.causal, a.window};
  const auto [kv_begin, kv_end] = kv_range(mask, task, task.q_begin, task.q_end);
  const int keys = kv_end - kv_begin;
  const T* const query_rows = (const T*)a.qkv + task.start * a.stride + head * D;
  const T* const key_rows = query_rows + a.heads * D + kv_begin * a.stride;
  const int64_t o_stride = a.heads * D, o_start = task.start * o_stride + head * D;

  thread_local Scratch scratch;
  thread_local DropoutBlock dropout_mask;
  const BackwardBuffers<T, D> b(scratch, key_rows, key_rows + a.heads * D, a.stride, keys);
  const auto prefetch = [&] { next_rows.next(); };
  const float scale = a.scale * LOG2_E, dropout_scale = 256.f / (256 - a.dropout.threshold);
  // lse is relative to the mean, so the recomputed probabilities are too large by a factor of the length.
  const float inv_length = 1.f / task.length;
  alignas(64) float lse[BLOCK], delta[BLOCK];
  for (int query = task.q_begin; query < task.q_end; query += BLOCK) {
    const int queries = block_at(query, task.q_end), columns = registers(queries);
    const auto [begin, end] = kv_range(mask, task, query, query + queries);
    if (begin >= end) continue;
    next_rows.pace((double)queries / (task.q_end - task.q_begin), 5 * (end - begin) / MAX_TILE_ROWS);
    const T* const d_o_block = (const T*)a.d_o + o_start + query * o_stride;
    b.pack_queries(query_rows + query * a.stride, a.stride, d_o_block, o_stride, queries);
    dot_rows<D>(d_o_block, (const T*)a.o + o_start + query * o_stride, o_stride, queries, 1 / dropout_scale, delta);
    std::memset(lse, 0, sizeof lse);
    std::memcpy(lse, a.lse + head * a.capacity + task.start + query, queries * sizeof(float));
    for (int key = begin; key < end; key += BLOCK) {
      const int block_keys = block_at(key, end), rows = even(block_keys), row = key - kv_begin;
      matmul<D / N, 1, BLOCK>(b.k_rows + row * (D / N), b.q_columns, D / N, b.scores, rows, columns, {true}, prefetch);
      matmul<D / N, 1, BLOCK>(b.v_rows + row * (D / N), b.d_o_columns, D / N, b.d_p, rows, columns, {true}, prefetch);
      mask.apply(b.scores, query, queries, key, block_keys);
      if (a.dropout.threshold) {
        dropout_mask.draw(a.dropout, task.sequence, head, query, queries, key, block_keys);
        score_gradients<F, true>(b.scores, b.d_p, rows, queries, scale, lse, delta, dropout_mask, a.dropout.threshold,
                                 b.gradients);
      } else {
        score_gradients<F, false>(b.scores, b.d_p, rows, queries, scale, lse, delta, dropout_mask, 0, b.gradients);
      }
      if (task.all_queries()) {
        const int depth = (queries + N - 1) / N;
        matmul<BLOCK / N, 1, D>(b.gradients.p_rows, b.d_o, depth, b.d_v + row * D, rows, D / LANES, {false}, prefetch);
        matmul<BLOCK / N, 1, D>(b.gradients.d_s_rows, b.q, depth, b.d_k + row * D, rows, D / LANES, {false}, prefetch);
      }
      if (task.all_keys())
        matmul<1, BLOCK, D>(b.gradients.d_s, b.k + row / N * D, (block_keys + N - 1) / N, b.d_q, even(queries),
                            D / LANES, {key == begin}, prefetch);
    }
    if (task.all_keys())
      write_gradient<D, T>(a, b.d_q, queries, a.scale * dropout_scale * inv_length, 0, head, task.start + query);
  }
  if (!task.all_queries()) return;
  write_gradient<D, T>(a, b.d_k, keys, a.scale * dropout_scale * inv_length, 1, head, task.start + kv_begin);
  write_gradient<D, T>(a, b.d_v, keys, dropout_scale * inv_length, 2, head, task.start + kv_begin);
}

void attention_backward(const AttentionBackward& a) {
  with_shape(a, [&]<class T, int D>(T, std::integral_constant<int, D>) {
    const int64_t token = 3 * a.heads * D * sizeof(T);
    clear(a.d_qkv, a.num_tokens * token, a.capacity * token);
    for_each_head(a, [&](const AttentionTask& task, int head, const AttentionTask* next_task, int next_head) {
      differentiate<T, D>(a, task, head, rows_of_head<T, D>(a, next_task, next_head));
    });
  });
}

}  // namespace bertfast::BERTFAST_SET
