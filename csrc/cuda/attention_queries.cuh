// Attention's backward pass over blocks of queries: d_q of sequences that are too long for one block to compute all
// gradients (attention_keys.cuh).
#pragma once
#include "attention_delta.cuh"

namespace bertfast::cuda {

// Queries of both consumers, and a ring buffer of tiles of ROWS keys.
template <int D>
struct QueryMemory {
  static constexpr int STAGES = D == 128 ? 3 : 6;
  static_assert(STAGES >= 2, "the scores of the next tile start before a tile's stage is released");
  Tile<ROWS, D> q[2], d_o[2], k[STAGES], v[STAGES];
  WorkRing work;
  uint64_t q_full, q_empty, full[STAGES], empty[STAGES];
};

template <int D>
DEVICE void load_work(QueryMemory<D>& memory, const TileScheduler& scheduler, const AttentionBackward& a,
                      const CUtensorMap* qkv, const CUtensorMap* d_o) {
  using Memory = QueryMemory<D>;
  int loaded = 0, tiles = 0;  // work tiles and key tiles so far
  for (int turn = 0; scheduler.has(turn); ++turn) {
    const WorkTile work = scheduler[turn];
    memory.work.put(turn, work);
    if (work.is_empty()) continue;
    const AttentionMask mask(a, work.length);
    wait(&memory.q_empty, (loaded++ + 1) % 2);
    arrive_expecting(&memory.q_full, 4 * Tile<ROWS, D>::BYTES);
    for (int consumer = 0; consumer < 2; ++consumer) {
      const int64_t token = work.start + work.first + consumer * ROWS;
      load_tile(memory.q[consumer], qkv, &memory.q_full, work.head, token);
      load_tile(memory.d_o[consumer], d_o, &memory.q_full, work.head, token);
    }
    for (int key = mask.kv_begin(work.first) / ROWS * ROWS; key < mask.kv_end(work.end); key += ROWS, ++tiles) {
      const int stage = tiles % Memory::STAGES;
      wait(&memory.empty[stage], (tiles / Memory::STAGES + 1) % 2);
      arrive_expecting(&memory.full[stage], 2 * Tile<ROWS, D>::BYTES);
      load_tile(memory.k[stage], qkv, &memory.full[stage], a.heads + work.head, work.start + key);
      load_tile(memory.v[stage], qkv, &memory.full[stage], 2 * a.heads + work.head, work.start + key);
    }
  }
}

// Turn d_s, the gradients of the probabilities, into those of the scores p; `stats` of the thread's two queries. As in
// attention_keys.cuh, conditions are constants or branches around several elements.
template <bool DROPS, class DropoutMask>
DEVICE void differentiate_softmax(const AttentionMask& mask, const DropoutMask& dropout_mask, int query, int key,
                                  float scale, const Statistics (&stats)[2], const float (&p)[ROWS / 2],
                                  float (&d_s)[ROWS / 2]) {
  UNROLL_FOR (int column = 0; column < ROWS; column += 32) {
    uint32_t kept = KeptElements::ALL;
    if constexpr (DROPS) kept = dropout_mask.template kept<false>(query + warp_row(), key + column).in_one_register();
    UNROLL_FOR (int i = column / 2; i < column / 2 + 16; ++i) {
      const float d = kept >> KeptElements::bit(i % 16) & 1 ? d_s[i] : 0.f;
      d_s[i] = fast_exp2(p[i] * scale - stats[i / 2 % 2].lse) * (d - stats[i / 2 % 2].delta);
    }
  }
  if (mask.limits(query, ROWS, key, ROWS))
    UNROLL_FOR (int i = 0; i < ROWS / 2; ++i)
      if (!mask.reaches(query + fragment_row(i), key + fragment_column(i))) d_s[i] = 0;
  if (key + ROWS > mask.length) fill_columns(d_s, mask.length - key, 0.f);  // v may hold NaN there
}

// A consumer: computes d_q of ROWS queries of each work tile. The tensor cores compute the next tile's scores, and add
// to d_q, during the softmax, as in attention_keys.cuh.
template <class T, int D>
class QueryGradientConsumer {
 public:
  using Memory = QueryMemory<D>;
  using DropoutMask = AttentionDropoutMask<true>;

  DEVICE QueryGradientConsumer(Memory& memory, const TileScheduler& scheduler, const AttentionBackward& a)
      : memory_(memory), scheduler_(scheduler), a_(a), consumer_(consumer_index()) {}

  DEVICE void run() {
    for (int turn = 0; scheduler_.has(turn); ++turn) {
      const WorkTile work = uniform(memory_.work.take(turn));
      if (work.is_empty()) continue;
      DropoutMask dropout_mask(a_.dropout);  // once per kernel it would cost registers: 5 % more time
      dropout_mask.select(work);
      differentiate(work, AttentionMask(a_, work.length), dropout_mask);
    }
  }

 private:
  DEVICE void differentiate(const WorkTile& work, const AttentionMask& mask, const DropoutMask& dropout_mask) {
    const int query = work.first + consumer_ * ROWS, last_key = mask.kv_end(work.end);
    int key = mask.kv_begin(work.first) / ROWS * ROWS;
    const int first = query < work.end ? mask.kv_begin(query) / ROWS * ROWS : last_key;  // of this consumer's keys
    const int end = query + ROWS < work.end ? mask.kv_end(query + ROWS) : last_key;
    const float factor = a_.scale * dropout_mask.scale();
    Statistics stats[2];
    UNROLL_FOR (int h = 0; h < 2; ++h) stats[h] = Statistics::of(a_, work, query + fragment_row(2 * h));
    float d_q[D / 2] = {}, p[ROWS / 2], d_s[ROWS / 2];
    uint32_t pairs[ROWS / 16][4];
    wait(&memory_.q_full, done_++ % 2);
    const auto finish_scores = [&](int first_key) {
      const float scale = a_.scale * LOG2_E;
      if (dropout_mask.drops()) differentiate_softmax<true>(mask, dropout_mask, query, first_key, scale, stats, p, d_s);
      else differentiate_softmax<false>(mask, dropout_mask, query, first_key, scale, stats, p, d_s);
    };
    const auto add_gradients = [&](int stage) {
      fence_wgmma(d_q);
      UNROLL_FOR (int depth = 0; depth < ROWS; depth += 16)
        wgmma<Major::mn>(T{}, d_q, pairs[depth / 16], memory_.k[stage].template slice<Major::mn>(depth), true);
      commit_wgmma();
    };
    const auto pack_gradients = [&] {
      UNROLL_FOR (int i = 0; i < ROWS / 4; ++i) pairs[i / 4][i % 4] = pack(T{}, d_s[2 * i], d_s[2 * i + 1]);
    };
    for (; key < first; key += ROWS) skip_tile(mask, key);
    if (key < end) {
      int stage = wait_for_tile(mask, key);
      start_scores(stage, p, d_s);
      wait_wgmma<0>(p, d_s);
      finish_scores(key);
      for (; key + ROWS < end; key += ROWS) {
        pack_gradients();
        const int next = wait_for_tile(mask, key + ROWS);
        start_scores(next, p, d_s);
        add_gradients(stage);
        wait_wgmma<1>(p, d_s);
        finish_scores(key + ROWS);
        wait_wgmma<0>(d_q);
        release(stage), stage = next;
      }
      pack_gradients();
      add_gradients(stage);
      wait_wgmma<0>(d_q);
      release(stage), key += ROWS;
    }
    for (; key < last_key; key += ROWS) skip_tile(mask, key);
    if (threadIdx.x % 32 == 0) arrive(&memory_.q_empty);
    store_rows(d_q, factor, factor, work.length - query,
               (T*)a_.d_qkv + ((work.start + query) * 3 * a_.heads + work.head) * D, (int64_t)3 * a_.heads * D);
  }

  // Start the matmuls of a tile of keys: p, the scores, and d_s, the gradients of the probabilities.
  DEVICE void start_scores(int stage, float (&p)[ROWS / 2], float (&d_s)[ROWS / 2]) {
    const int q = uniform(consumer_);
    fence_wgmma(p, d_s);
    UNROLL_FOR (int depth = 0; depth < D; depth += 16)
      wgmma<Major::k, Major::k>(T{}, p, memory_.q[q].template slice<Major::k>(depth),
                                memory_.k[stage].template slice<Major::k>(depth), depth > 0);
    UNROLL_FOR (int depth = 0; depth < D; depth += 16)
      wgmma<Major::k, Major::k>(T{}, d_s, memory_.d_o[q].template slice<Major::k>(depth),
                                memory_.v[stage].template slice<Major::k>(depth), depth > 0);
    commit_wgmma();
  }

  // Wait until the next tile of keys, from `key` on, is in shared memory, and return its stage.
  DEVICE int wait_for_tile(const AttentionMask& mask, int key) {
    const int stage = uniform(tiles_ % Memory::STAGES);
    wait_for_stage(mask, key, stage);
    return stage;
  }

  // Wait for the next tile of keys, which this consumer's queries do not attend to, and release it. The shuffle is
  // after the wait, as in attention.cu: no lane releases a tile, or q if there are no queries, before all have waited
  // for it.
  DEVICE void skip_tile(const AttentionMask& mask, int key) {
    const int stage = tiles_ % Memory::STAGES;
    wait_for_stage(mask, key, stage);
    release(uniform(stage));
  }

  // Wait until a stage holds the next tile of keys. Both consumers zero the rows beyond the sequence's end.
  DEVICE void wait_for_stage(const AttentionMask& mask, int key, int stage) {
    wait(&memory_.full[stage], tiles_++ / Memory::STAGES % 2);
    if (key + ROWS > mask.length) {
      zero_rows(memory_.k[stage], mask.length - key);
      fence_proxy();
      named_barrier_sync<ALL_CONSUMERS>(CONSUMERS);
    }
  }

  // Let the producer overwrite a stage.
  DEVICE void release(int stage) {
    if (threadIdx.x % 32 == 0) arrive(&memory_.empty[stage]);
  }

  Memory& memory_;
  const TileScheduler& scheduler_;
  const AttentionBackward& a_;
  const int consumer_;
  int done_ = 0, tiles_ = 0;  // work tiles and key tiles so far
};

template <class T, int D>
__global__ void __launch_bounds__(ATTENTION_THREADS, 1)
    attention_queries_kernel(const AttentionBackward a, const TileScheduler scheduler,
                             const __grid_constant__ CUtensorMap qkv, const __grid_constant__ CUtensorMap d_o) {
  using Memory = QueryMemory<D>;
  static_assert(sizeof(Memory) <= MAX_SHARED_BYTES);
  Memory& memory = shared_memory<Memory>();
  if (threadIdx.x == 0) {
    init(&memory.q_full, 1);
    init(&memory.q_empty, CONSUMERS / 32);
    init_ring(memory.work.full, memory.work.empty);
    init_ring(memory.full, memory.empty);
    fence_init();
  }
  specialize_warps([&] { load_work<D>(memory, scheduler, a, &qkv, &d_o); },
                   [&] { QueryGradientConsumer<T, D>(memory, scheduler, a).run(); }, [] {});
}

}  // namespace bertfast::cuda
