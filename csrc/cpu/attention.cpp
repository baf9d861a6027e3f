#include "attention.h"

#include "attention_blocks.h"

namespace bertfast::BERTFAST_SET {

// What a thread works with: blocks of its queries, and the keys and values of its sequence.
template <class E>
struct ForwardScratch {
  E *queries, *keys, *values;  // [D][BLOCK], [L][D], [L][D]; pairs along the products' depth
  float *scores, *output;      // [BLOCK][BLOCK], [D][BLOCK]
  E* probabilities;            // [BLOCK][BLOCK], over the scores
  BlockMask* mask;

  ForwardScratch(Scratch& scratch, int64_t keys_room, int64_t width) {
    const int64_t floats = (width + BLOCK + width) * BLOCK + 2 * keys_room * width;
    Pieces pieces(scratch.room<char>(floats * sizeof(float) + sizeof(BlockMask) + 8 * 64));
    queries = pieces.take<E>(width * BLOCK);
    scores = pieces.take<float>(BLOCK * BLOCK);
    probabilities = (E*)scores;
    output = pieces.take<float>(width * BLOCK);
    mask = pieces.take<BlockMask>(1);
    keys = pieces.take<E>(keys_room * width);
    values = pieces.take<E>(keys_room * width);
  }
};

// Scores [keys][queries] of a block become probabilities relative to the highest so far, in place; `highest`, `total`
// and, for what was summed before, `rescale` [BLOCK] follow.
template <class E, bool MASKED, bool DROPOUT>
static void online_softmax(const AttentionInput& a, const ForwardScratch<E>& own, int64_t query, int queries,
                           int64_t key, int keys, int padded, float* highest, float* total, float* rescale) {
  const float scale = a.scale * LOG2_E;
  const Words threshold = splat((uint32_t)a.threshold);
  for (int q = 0; q < queries; q += LANES) {
    const float* const scores = own.scores + q;
    const auto score = [&](int k) {
      const Floats s = load(scores + k * BLOCK) * scale;
      if constexpr (!MASKED) return s;
      return sees(a, query + q, key + k) ? s : splat(-__builtin_inff());
    };
    Floats peaks[4];
    UNROLL for (int i = 0; i < 4; ++i) peaks[i] = load(highest + q);
    int k = 0;
    for (; k + 4 <= keys; k += 4) UNROLL for (int i = 0; i < 4; ++i) peaks[i] = maximum(score(k + i), peaks[i]);
    for (; k < keys; ++k) peaks[0] = maximum(score(k), peaks[0]);
    const Floats peak = maximum(maximum(peaks[0], peaks[1]), maximum(peaks[2], peaks[3]));
    const Floats factor = exp2(load(highest + q) - peak);
    Floats sums[2] = {load(total + q) * factor, Floats{}};
    const auto probabilities = [&](int k, bool second) {
      Floats p[2] = {exp2(score(k) - peak), second ? exp2(score(k + 1) - peak) : Floats{}};
      sums[0] += p[0], sums[1] += p[1];
      if constexpr (DROPOUT) {
        const Words bytes = own.mask->bytes(q, k);
        p[0] = (bytes & 0xff) >= threshold ? p[0] : splat(0.f);
        p[1] = bytes >> 8 >= threshold ? p[1] : splat(0.f);
      }
      if constexpr (ELEMENTS<E> == 2) {
        store(own.probabilities + k / 2 * BLOCK + q, pair(p[0], p[1]));
      } else {
        store(own.probabilities + k * BLOCK + q, p[0]);
        store(own.probabilities + (k + 1) * BLOCK + q, p[1]);
      }
    };
    for (k = 0; k + 2 <= keys; k += 2) probabilities(k, true);
    if (k < keys) probabilities(k, false), k += 2;
    for (; k < padded; k += 2)
      for (int i = 0; i < 2; i += ELEMENTS<E>) store(own.probabilities + (k + i) / ELEMENTS<E> * BLOCK + q, decltype(load(own.probabilities)){});
    store(highest + q, peak), store(total + q, sums[0] + sums[1]), store(rescale + q, factor);
  }
}

template <class T, class E>
static void forward(const AttentionForward& pass, const AttentionTask& task) {
  const AttentionInput& a = pass.input;
  const int width = (int)a.head_dimension, depth = width / ELEMENTS<E>;
  const int64_t start = a.cu_seqlens[task.sequence], length = a.cu_seqlens[task.sequence + 1] - start;
  const int64_t room = rounded_up(length, BLOCK);
  thread_local Scratch scratch;
  const ForwardScratch<E> own(scratch, room, width);
  const T* const q = (const T*)a.qkv + start * a.stride + task.head * width;
  const T *const k = q + a.heads * width, *const v = k + a.heads * width;
  const Range seen = visible(a, task.first_query, task.end_query, length);
  const int64_t first_key = seen.first / BLOCK * BLOCK;
  for (int64_t key = first_key; key < seen.end; key += BLOCK) {
    const int keys = (int)(seen.end - key < BLOCK ? seen.end - key : BLOCK), padded = rounded_up(keys, 8);
    pack_rows(k + key * a.stride, a.stride, keys, padded, width, own.keys + key * depth);
    pack_over_rows(v + key * a.stride, a.stride, keys, padded, width, own.values + key / ELEMENTS<E> * width);
  }
  for (int64_t query = task.first_query; query < task.end_query; query += BLOCK) {
    const int queries = (int)(task.end_query - query < BLOCK ? task.end_query - query : BLOCK);
    const int columns = rounded_up(queries, LANES);
    pack_columns(q + query * a.stride, a.stride, queries, columns, width, own.queries);
    alignas(64) float highest[BLOCK], total[BLOCK] = {}, rescale[BLOCK];
    for (float& x : highest) x = -3e38f;
    std::memset(own.output, 0, width * BLOCK * sizeof(float));
    const Range keys_seen = visible(a, query, query + queries, length);
    for (int64_t key = keys_seen.first / BLOCK * BLOCK; key < keys_seen.end; key += BLOCK) {
      const int keys = (int)(keys_seen.end - key < BLOCK ? keys_seen.end - key : BLOCK), padded = rounded_up(keys, 8);
      multiply<E, Start::zero>({own.keys + key * depth, depth, 1}, padded, depth, own.queries, BLOCK, columns,
                               own.scores, BLOCK);
      if (a.threshold) own.mask->draw(a, task, query, columns, key, keys);
      const bool masked = !sees_all(a, query, queries, key, keys);
      const auto softmax = masked ? (a.threshold ? online_softmax<E, true, true> : online_softmax<E, true, false>)
                                  : (a.threshold ? online_softmax<E, false, true> : online_softmax<E, false, false>);
      softmax(a, own, query, columns, key, keys, padded, highest, total, rescale);
      multiply<E, Start::rescaled>({own.values + key / ELEMENTS<E> * width, 1, width}, width, padded / ELEMENTS<E>,
                                   own.probabilities, BLOCK, columns, own.output, BLOCK, rescale);
    }
    const float kept = 256.f / (256 - a.threshold);
    float* const lse = pass.lse + task.head * a.tokens + start + query;
    for (int i = 0; i < columns; i += LANES) {
      const Floats sum = load(total + i), factor = kept / sum;
      for (int d = 0; d < width; ++d) store(own.output + d * BLOCK + i, load(own.output + d * BLOCK + i) * factor);
      const Floats logarithm = load(highest + i) + log2(sum);
      i + LANES <= queries ? store(lse + i, logarithm) : store(lse + i, logarithm, queries - i);
    }
    T* const o = (T*)pass.o + ((start + query) * a.heads + task.head) * width;
    store_transposed(own.output, BLOCK, queries, width, o, a.heads * width);
  }
}

void attention_forward(const AttentionForward& pass) {
  const AttentionInput& a = pass.input;
  with_elements(a.type, [&]<class T, class E>(T, E) {
    each(a.count, [&](int64_t task) { forward<T, E>(pass, a.tasks[task]); });
    const int64_t used = a.cu_seqlens[a.sequences], row = a.heads * a.head_dimension;
    std::memset((T*)pass.o + used * row, 0, (a.tokens - used) * row * sizeof(T));
  });
}

}  // namespace bertfast::BERTFAST_SET
