#include "../attention.h"

#include "attention_block.h"
#include "attention_dropout.h"
#include "attention_prefetch.h"

namespace bertfast::BERTFAST_SET {

// Online softmax of a block of queries (Milakov and Gimelshein, 2018): row maximum and sum of the exponentials so far.
struct SoftmaxState {
  alignas(64) float m_i[BLOCK], l_i[BLOCK], alpha[BLOCK];  // alpha: the factor that rescales the output so far
  alignas(64) float offset[BLOCK];                         // subtracted from scaled scores
};

// Update the row maxima and what follows from them. This is a pass of its own, because exponentials would wait for it.
static void update_maxima(const float* scores, int keys, int queries, float scale, SoftmaxState& state) {
  for (int column = 0; column < queries; column += LANES) {
    const Floats m_i = load(state.m_i + column);
    Floats m_new[2] = {m_i, m_i};
    for (int key = 0; key < keys; key += 2)
      UNROLL_FOR (int i = 0; i < 2; ++i) m_new[i] = maximum(m_new[i], load(scores + (key + i) * BLOCK + column));
    m_new[0] = maximum(m_new[0], m_new[1]);
    store(state.m_i + column, m_new[0]);
    // All keys so far are masked: -inf - -inf is NaN.
    const Floats reference = m_new[0] == -__builtin_inff() ? splat(0.f) : m_new[0];
    store(state.offset + column, reference * scale);
    store(state.alpha + column, exp2((m_i - reference) * scale));
  }
}

// Replace scores by unnormalised probabilities, as operands [keys / ELEMENTS, BLOCK], and update the state. The keys
// are a multiple of KEYS_PER_STEP.
template <class F, bool DROPOUT>
static void online_softmax(float* scores, int keys, int queries, float scale, const DropoutBlock& dropout_mask,
                           int threshold, SoftmaxState& state) {
  constexpr int STEP = KEYS_PER_STEP;
  update_maxima(scores, keys, queries, scale, state);
  for (int column = 0; column < queries; column += LANES) {
    float* const s = scores + column;
    const Floats offset = load(state.offset + column);
    Floats l_i[2] = {};
    for (int key = 0; key < keys; key += STEP) {
      Floats p[STEP];
      UNROLL_FOR (int i = 0; i < STEP; ++i) p[i] = load(s + (key + i) * BLOCK) * scale - offset;
      exp2<EXP2_DEGREE<F>>(p);
      UNROLL_FOR (int i = 0; i < STEP; ++i) l_i[i % 2] += p[i];
      if constexpr (DROPOUT) {
        LaneMask kept[STEP];
        UNROLL_FOR (int i = 0; i < STEP; i += 2) dropout_mask.kept(key + i, column, threshold, kept[i], kept[i + 1]);
        UNROLL_FOR (int i = 0; i < STEP; ++i) p[i] = where(kept[i], p[i]);
      }
      if constexpr (ELEMENTS<F> == 2)
        UNROLL_FOR (int i = 0; i < STEP; i += 2)
          store((uint32_t*)s + (key + i) / 2 * BLOCK, pack_bf16_pairs(p[i], p[i + 1]));
      else
        UNROLL_FOR (int i = 0; i < STEP; ++i) store(s + (key + i) * BLOCK, p[i]);
    }
    store(state.l_i + column, load(state.l_i + column) * load(state.alpha + column) + (l_i[0] + l_i[1]));
  }
}

// The rows that a task reads and writes for a head; none without a task.
template <class T, int D>
static RowPrefetch<T, D> rows_of_head(const AttentionForward& a, const AttentionTask* task, int head) {
  RowPrefetch<T, D> rows;
  if (task == nullptr) return rows;
  const Range keys = kv_range({a.causal, a.window}, *task, task->q_begin, task->q_end);
  const int64_t part = a.heads * D, query = task->start + task->q_begin, key = task->start + keys.begin;
  rows.add((const T*)a.qkv + query * a.stride + head * D, a.stride, task->q_end - task->q_begin);
  rows.add((const T*)a.qkv + key * a.stride + part + head * D, a.stride, keys.end - keys.begin, 2, part);
  rows.add((const T*)a.o + query * part + head * D, part, task->q_end - task->q_begin);
  return rows;
}

template <class T, int D>
static void attend(const AttentionForward& a, const AttentionTask& task, int head, RowPrefetch<T, D> next_rows) {
  using F = Operand<T>;
  constexpr int N = ELEMENTS<F>;
  const AttentionMask mask{a.causal, a.window};
  const auto [kv_begin, kv_end] = kv_range(mask, task, task.q_begin, task.q_end);
  const int keys = kv_end - kv_begin;
  const T* const query_rows = (const T*)a.qkv + task.start * a.stride + head * D;
  const T* const key_rows = query_rows + a.heads * D + kv_begin * a.stride;

  thread_local Scratch scratch;
  thread_local DropoutBlock dropout_mask;
  float* const scores = scratch.reserve<float>(BLOCK * BLOCK + 2 * (BLOCK + even(keys)) * D);
  float* const sums = scores + BLOCK * BLOCK;
  F *const q = (F*)(sums + BLOCK * D), *const k = q + BLOCK * D, *const v = k + even(keys) * D;
  pack_rows<D>(key_rows, a.stride, keys, even(keys), k);
  pack_stacked<D>(key_rows + a.heads * D, a.stride, keys, even(keys), v);

  const auto prefetch = [&] { next_rows.next(); };
  const float scale = a.scale * LOG2_E, dropout_scale = 256.f / (256 - a.dropout.threshold);
  for (int query = task.q_begin; query < task.q_end; query += BLOCK) {
    const int queries = block_at(query, task.q_end), columns = registers(queries);
    pack_columns<D>(query_rows + query * a.stride, a.stride, queries, q);
    SoftmaxState state;
    for (int i = 0; i < BLOCK; ++i) state.m_i[i] = -__builtin_inff(), state.l_i[i] = 0;
    const auto [begin, end] = kv_range(mask, task, query, query + queries);
    next_rows.pace((double)queries / (task.q_end - task.q_begin), 2 * (end - begin) / MAX_TILE_ROWS);
    for (int key = begin; key < end; key += BLOCK) {
      const int block_keys = block_at(key, end), step_keys = round_up(block_keys, KEYS_PER_STEP);
      matmul<D / N, 1, BLOCK>(k + (key - kv_begin) * (D / N), q, D / N, scores, even(block_keys), columns, {true},
                              prefetch);
      mask.apply(scores, query, queries, key, block_keys);
      if (a.dropout.threshold) {
        dropout_mask.draw(a.dropout, task.sequence, head, query, queries, key, block_keys);
        online_softmax<F, true>(scores, step_keys, queries, scale, dropout_mask, a.dropout.threshold, state);
      } else {
        online_softmax<F, false>(scores, step_keys, queries, scale, dropout_mask, 0, state);
      }
      matmul<1, BLOCK, D>((const F*)scores, v + (key - kv_begin) / N * D, (block_keys + N - 1) / N, sums, even(queries),
                          D / LANES, {key == begin, state.alpha}, prefetch);
    }
    // From here on alpha holds the normalisation of the output, and l_i the log-sum-exp relative to the mean.
    for (int column = 0; column < queries; column += LANES) {
      const Floats l_i = load(state.l_i + column);
      store(state.alpha + column, dropout_scale / l_i);
      store(state.l_i + column, load(state.m_i + column) * scale + log2(l_i / (float)task.length));
    }
    const int64_t token = task.start + query;
    write_rows<D>(sums, queries, state.alpha, (T*)a.o + (token * a.heads + head) * D, a.heads * D);
    std::memcpy(a.lse + head * a.capacity + token, state.l_i, queries * sizeof(float));
  }
}

void attention_forward(const AttentionForward& a) {
  with_shape(a, [&]<class T, int D>(T, std::integral_constant<int, D>) {
    clear(a.o, a.num_tokens * a.heads * D * sizeof(T), a.capacity * a.heads * D * sizeof(T));
    for_each_head(a, [&](const AttentionTask& task, int head, const AttentionTask* next_task, int next_head) {
      attend<T, D>(a, task, head, rows_of_head<T, D>(a, next_task, next_head));
    });
  });
}

}  // namespace bertfast::BERTFAST_SET
