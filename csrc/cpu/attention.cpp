#include "../attention.h"

#include "attention_block.h"
#include "attention_dropout.h"

namespace bertfast::BERTFAST_SET {

// What is known of a block of queries so far: online softmax (Milakov and Gimelshein, 2018).
struct Statistics {
  alignas(64) float highest[BLOCK], total[BLOCK], shrink[BLOCK];  // shrink: what the sums so far are multiplied by
};

// Scores become probabilities, up to a factor for each query: factors [keys / NUMBERS, BLOCK] in their place.
template <class F, bool DROPOUT>
static void soften(float* scores, int keys, int queries, float scale, const DropoutBlock& mask, int threshold,
                   Statistics& known) {
  for (int column = 0; column < queries; column += LANES) {
    float* const s = scores + column;
    const Floats before = load(known.highest + column);
    Floats highest[2] = {before, before};
    for (int key = 0; key < keys; key += 2)
      UNROLL for (int i = 0; i < 2; ++i) highest[i] = maximum(highest[i], load(s + (key + i) * BLOCK));
    highest[0] = maximum(highest[0], highest[1]);
    store(known.highest + column, highest[0]);
    // Nothing seen yet: -infinity less -infinity is no number.
    const Floats reference = highest[0] == -__builtin_inff() ? splat(0.f) : highest[0];
    const Floats offset = reference * scale, shrink = exp2((before - reference) * scale);
    Floats total[2] = {load(known.total + column) * shrink, {}};
    for (int key = 0; key < keys; key += 2) {
      Floats p[2];
      UNROLL for (int i = 0; i < 2; ++i) {
        p[i] = exp2(load(s + (key + i) * BLOCK) * scale - offset);
        total[i] += p[i];
      }
      if constexpr (DROPOUT) {
        Mask kept[2];
        mask.kept(key, column, threshold, kept[0], kept[1]);
        UNROLL for (int i = 0; i < 2; ++i) p[i] = where(kept[i], p[i]);
      }
      if constexpr (NUMBERS<F> == 2) store((uint32_t*)s + key / 2 * BLOCK, join(p[0], p[1]));
      else UNROLL for (int i = 0; i < 2; ++i) store(s + (key + i) * BLOCK, p[i]);
    }
    store(known.total + column, total[0] + total[1]);
    store(known.shrink + column, shrink);
  }
}

template <class T, int D>
static void attend(const AttentionForward& a, const AttentionTask& task, int head) {
  using F = Factor<T>;
  constexpr int N = NUMBERS<F>;
  const Sight sight{a.causal, a.window};
  const int first_key = sight.first_key(task.first_query), end_key = sight.end_key(task.end_query, task.length);
  const int keys = end_key - first_key;
  const T* const query_rows = (const T*)a.qkv + task.start * a.stride + head * D;
  const T* const key_rows = query_rows + a.heads * D + first_key * a.stride;

  thread_local Scratch scratch;
  thread_local DropoutBlock mask;
  float* const scores = scratch.room<float>(BLOCK * BLOCK + 2 * (BLOCK + even(keys)) * D);
  float* const sums = scores + BLOCK * BLOCK;
  F *const q = (F*)(sums + BLOCK * D), *const k = q + BLOCK * D, *const v = k + even(keys) * D;
  pack_rows<D>(key_rows, a.stride, keys, even(keys), k);
  pack_stacked<D>(key_rows + a.heads * D, a.stride, keys, even(keys), v);

  const float scale = a.scale * LOG2_E, kept = 256.f / (256 - a.dropout.threshold);
  for (int query = task.first_query; query < task.end_query; query += BLOCK) {
    const int queries = block_at(query, task.end_query), columns = registers(queries);
    pack_columns<D>(query_rows + query * a.stride, a.stride, queries, q);
    Statistics known;
    for (int i = 0; i < BLOCK; ++i) known.highest[i] = -__builtin_inff(), known.total[i] = 0;
    const int begin = sight.first_key(query), end = sight.end_key(query + queries, task.length);
    for (int key = begin; key < end; key += BLOCK) {
      const int some = block_at(key, end);
      product<D / N, 1, BLOCK>(k + (key - first_key) * (D / N), q, D / N, scores, even(some), columns, {true});
      sight.hide(scores, query, queries, key, some);
      if (a.dropout.threshold) {
        mask.draw(a.dropout, task.sequence, head, query, queries, key, some);
        soften<F, true>(scores, even(some), queries, scale, mask, a.dropout.threshold, known);
      } else {
        soften<F, false>(scores, even(some), queries, scale, mask, 0, known);
      }
      product<1, BLOCK, D>((const F*)scores, v + (key - first_key) / N * D, (some + N - 1) / N, sums, even(queries),
                           D / LANES, {key == begin, known.shrink});
    }
    for (int column = 0; column < queries; column += LANES) {
      const Floats total = load(known.total + column);
      store(known.shrink + column, kept / total);
      store(known.total + column, load(known.highest + column) * scale + log2(total / (float)task.length));
    }
    const int64_t token = task.start + query;
    write_rows<D>(sums, queries, known.shrink, (T*)a.o + (token * a.heads + head) * D, a.heads * D);
    std::memcpy(a.lse + head * a.tokens + token, known.total, queries * sizeof(float));
  }
}

void attention_forward(const AttentionForward& a) {
  with_shape(a, [&]<class T, int D>(T, std::integral_constant<int, D>) {
    clear(a.o, a.used * a.heads * D * sizeof(T), a.tokens * a.heads * D * sizeof(T));
    each(a.task_count, [&](int64_t index) {
      const AttentionTask& task = a.tasks[index];
      for (int head = task.first_head; head < task.end_head; ++head) attend<T, D>(a, task, head);
    });
  });
}

}  // namespace bertfast::BERTFAST_SET
