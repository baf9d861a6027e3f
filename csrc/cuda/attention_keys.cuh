// Attention's backward pass over blocks of keys: d_k and d_v, and for a short sequence also d_q, so that one
// work tile computes all gradients of a head in one pass over its scores.
//
// Scores and their gradients are computed transposed, [keys, queries], so that their registers are the A operands of
// the wgmma for d_v and d_k; only a 16-bit copy of d_s goes through shared memory, for d_q.
#pragma once
#include "attention_delta.cuh"

namespace bertfast::cuda {

// The longest sequence whose d_q, in fp32, fits into a block's shared memory, and the longest for which a second block
// of keys does, too.
template <int D>
constexpr int MAX_FUSED_SEQLEN = D == 128 ? 128 : 512;
template <int D>
constexpr int MAX_PREFETCHED_SEQLEN = D == 64 ? 256 : MAX_FUSED_SEQLEN<D>;

// Whether the kernel that computes d_q, too, computes delta: with D = 128 there are too few registers.
template <int D>
constexpr bool COMPUTES_DELTA = D != 128;

// No sequence is longer than MAX_SEQLEN, and d_q is computed, too (FUSED), unless MAX_SEQLEN is 0. Keys and queries are
// in ring buffers; that of keys has a single stage if a second one does not fit.
template <int D, int MAX_SEQLEN>
struct KeyMemory {
  static constexpr bool FUSED = MAX_SEQLEN > 0;
  static constexpr int D_Q_FLOATS = MAX_SEQLEN * D, OTHER_BYTES = D_Q_FLOATS * 4 + (BLOCK * ROWS * 2 + 2048);
  static constexpr int KEY_BYTES = 2 * Tile<BLOCK, D>::BYTES, QUERY_BYTES = 2 * Tile<ROWS, D>::BYTES;
  static constexpr int KEY_STAGES = OTHER_BYTES + 2 * KEY_BYTES + 2 * QUERY_BYTES <= (int)MAX_SHARED_BYTES ? 2 : 1;
  static constexpr int FITTING = ((int)MAX_SHARED_BYTES - OTHER_BYTES - KEY_STAGES * KEY_BYTES) / QUERY_BYTES;
  static constexpr int STAGES = FITTING < 4 ? FITTING : 4;
  static_assert(STAGES >= 2, "the scores of the next step start before a step's stage is released");
  Tile<BLOCK, D> k[KEY_STAGES], v[KEY_STAGES];
  Tile<ROWS, D> q[STAGES], d_o[STAGES];
  Tile<BLOCK, ROWS> d_s;
  Statistics statistics[STAGES][ROWS];
  float d_q[FUSED ? MAX_SEQLEN / ROWS : 1][FUSED ? D / 4 : 1][CONSUMERS];  // [step][register][thread]
  WorkRing work;
  uint64_t keys_full[KEY_STAGES], keys_empty[KEY_STAGES], full[STAGES], empty[STAGES];
  uint64_t ready[STAGES];  // the statistics of a stage have been written
};

// The range of queries that attend to a block of keys, in steps of ROWS.
struct KeyPlan {
  int first_step, end_step;

  DEVICE KeyPlan(const AttentionMask& mask, int key)
      : first_step(mask.q_begin(key) / ROWS),
        end_step(ceil_div(mask.q_end(key + BLOCK < mask.length ? key + BLOCK : mask.length), ROWS)) {}

  // Whether a block of keys is the first, or the last, to which the queries of a step attend.
  DEVICE static bool is_first(const AttentionMask& mask, int key, int step) {
    return key < mask.kv_begin(step * ROWS) / BLOCK * BLOCK + BLOCK;
  }
  DEVICE static bool is_last(const AttentionMask& mask, int key, int step) {
    const int q_end = (step + 1) * ROWS;
    return key + BLOCK >= mask.kv_end(q_end < mask.length ? q_end : mask.length);
  }
};

template <int D, int MAX_SEQLEN>
DEVICE void load_work(KeyMemory<D, MAX_SEQLEN>& memory, const TileScheduler& scheduler, const AttentionBackward& a,
                      const CUtensorMap* qkv, const CUtensorMap* d_o) {
  using Memory = KeyMemory<D, MAX_SEQLEN>;
  int blocks = 0, steps = 0;  // loaded so far
  for (int turn = 0; scheduler.has(turn); ++turn) {
    const WorkTile work = scheduler[turn];
    memory.work.put(turn, work);
    const AttentionMask mask(a, work.length);
    for (int key = work.first; key < work.end; key += BLOCK, ++blocks) {
      const int key_stage = blocks % Memory::KEY_STAGES;
      wait(&memory.keys_empty[key_stage], (blocks / Memory::KEY_STAGES + 1) % 2);
      arrive_expecting(&memory.keys_full[key_stage], Memory::KEY_BYTES);
      load_tile(memory.k[key_stage], qkv, &memory.keys_full[key_stage], a.heads + work.head, work.start + key);
      load_tile(memory.v[key_stage], qkv, &memory.keys_full[key_stage], 2 * a.heads + work.head, work.start + key);
      const KeyPlan plan(mask, key);
      for (int step = plan.first_step; step < plan.end_step; ++step, ++steps) {
        const int stage = steps % Memory::STAGES;
        wait(&memory.empty[stage], (steps / Memory::STAGES + 1) % 2);
        arrive_expecting(&memory.full[stage], Memory::QUERY_BYTES);
        load_tile(memory.q[stage], qkv, &memory.full[stage], work.head, work.start + step * ROWS);
        load_tile(memory.d_o[stage], d_o, &memory.full[stage], work.head, work.start + step * ROWS);
      }
    }
  }
}

// Write the statistics of the queries of each stage. Up to 512 tokens delta is computed for the first block of keys of
// a step, and kept in global memory for the others.
template <class T, int D, int MAX_SEQLEN>
DEVICE void write_statistics(KeyMemory<D, MAX_SEQLEN>& memory, const TileScheduler& scheduler,
                             const AttentionBackward& a) {
  using Memory = KeyMemory<D, MAX_SEQLEN>;
  using Delta = StepDelta<T, D>;
  constexpr bool COMPUTES = Memory::FUSED && COMPUTES_DELTA<D>;
  const int row = Delta::own_row();
  int steps = 0;  // so far
  for (int turn = 0; scheduler.has(turn); ++turn) {
    const WorkTile work = memory.work.take(turn);
    const AttentionMask mask(a, work.length);
    for (int key = work.first; key < work.end; key += BLOCK) {
      const KeyPlan plan(mask, key);
      for (int step = plan.first_step; step < plan.end_step; ++step, ++steps) {
        const int stage = steps % Memory::STAGES, parity = steps / Memory::STAGES % 2, query = step * ROWS + row;
        const int64_t slot = Statistics::slot_of(a, work, query);
        const bool exists = query < work.length;
        const float lse = exists ? a.lse[slot] : INFINITY;
        float delta = 0;
        bool computes = false;
        if constexpr (COMPUTES) computes = KeyPlan::is_first(mask, key, step);
        if (!computes && exists) delta = a.delta[slot];
        if constexpr (COMPUTES)
          if (computes) {
            Delta computed(a, work, step * ROWS);
            computed.start();
            wait(&memory.full[stage], parity);
            delta = computed.sum(memory.d_o[stage]);
            if (exists && !KeyPlan::is_last(mask, key, step)) a.delta[slot] = delta;
          }
        if (!computes) wait(&memory.full[stage], parity);
        memory.statistics[stage][row] = Statistics::of(a, work, lse, exists ? delta : 0.f);
        __syncwarp();
        if (threadIdx.x % 32 == 0) arrive(&memory.ready[stage]);
      }
    }
  }
}

template <class T, int D, int MAX_SEQLEN>
class KeyConsumer {
 public:
  using Memory = KeyMemory<D, MAX_SEQLEN>;
  using DropoutMask = AttentionDropoutMask<false>;

  DEVICE KeyConsumer(Memory& memory, const TileScheduler& scheduler, const AttentionBackward& a)
      : memory_(memory), scheduler_(scheduler), a_(a), consumer_(consumer_index()), dropout_mask_(a.dropout) {}

  DEVICE void run() {
    for (int turn = 0; scheduler_.has(turn); ++turn) {
      const WorkTile work = memory_.work.take(turn);
      dropout_mask_.select(work);
      for (int key = work.first; key < work.end; key += BLOCK, ++blocks_) differentiate(work, key);
    }
  }

 private:
  // A block of keys, and the registers of its current step and of the one before.
  struct KeyBlock {
    const WorkTile& work;
    AttentionMask mask;
    int key, stage;
    float d_k[D / 2] = {}, d_v[D / 2] = {}, d_q[D / 4], p[ROWS / 2], d_s[ROWS / 2];
    uint32_t p_pairs[ROWS / 16][4], d_s_pairs[ROWS / 16][4];

    DEVICE KeyBlock(const AttentionInputs& a, const WorkTile& work, int key, int stage)
        : work(work), mask(a, work.length), key(key), stage(stage) {}
  };

  // Compute d_k and d_v of a block of keys, and its contribution to d_q. The tensor cores compute the next step's
  // scores while this step's gradients are shared, and add to d_v, d_k and d_q during the next step's softmax.
  DEVICE void differentiate(const WorkTile& work, int key) {
    KeyBlock block(a_, work, key, blocks_ % Memory::KEY_STAGES);
    const KeyPlan plan(block.mask, key);
    wait(&memory_.keys_full[block.stage], blocks_ / Memory::KEY_STAGES % 2);
    if (key + BLOCK > work.length) {
      zero_rows(memory_.k[block.stage], work.length - key);
      fence_proxy();
      named_barrier_sync<ALL_CONSUMERS>(CONSUMERS);
    }
    int step = plan.first_step;
    if constexpr (D == 128) {  // nothing overlaps: it would spill
      for (; step < plan.end_step; ++step, ++steps_) {
        start_scores(block, step, steps_);
        wait_wgmma<0>(block.p, block.d_s);
        finish_scores(block, step, steps_);
        share_gradients(block);
        add_gradients(block, steps_);
        finish_gradients(block, step, steps_);
      }
    } else if (step < plan.end_step) {
      start_scores(block, step, steps_);
      wait_wgmma<0>(block.p, block.d_s);
      finish_scores(block, step, steps_);
      for (; step + 1 < plan.end_step; ++step, ++steps_) {
        share_gradients(block);
        start_scores(block, step + 1, steps_ + 1);
        add_gradients(block, steps_);
        wait_wgmma<1>(block.p, block.d_s);
        finish_scores(block, step + 1, steps_ + 1);
        finish_gradients(block, step, steps_);
      }
      share_gradients(block);
      add_gradients(block, steps_);
      finish_gradients(block, step, steps_), ++steps_;
    }
    if (threadIdx.x % 32 == 0) arrive(&memory_.keys_empty[block.stage]);
    const int row = key + consumer_ * ROWS;
    const float dropout_scale = dropout_mask_.scale(), factor = a_.scale * dropout_scale;
    store_rows(block.d_k, factor, factor, work.length - row, gradient(work, 1, row), stride());
    store_rows(block.d_v, dropout_scale, dropout_scale, work.length - row, gradient(work, 2, row), stride());
  }

  // Start the matmuls of a step: p = k qᵀ, the scores, and d_s = v d_oᵀ, the gradients of the probabilities. `index` is
  // the number of steps before it, also of other blocks.
  DEVICE void start_scores(KeyBlock& block, int step, int index) {
    // With one stage of keys the compiler would keep their descriptors in 16 registers; after a shuffle it does not.
    const int consumer = Memory::KEY_STAGES > 1 ? consumer_ : uniform(consumer_);
    const int stage = index % Memory::STAGES, rows = block.work.length - step * ROWS;
    Tile<ROWS, D>&q = memory_.q[stage], &d_o = memory_.d_o[stage];
    wait(&memory_.full[stage], index / Memory::STAGES % 2);
    if (rows < ROWS) {
      zero_rows(q, rows), zero_rows(d_o, rows);
      fence_proxy();
      named_barrier_sync<ALL_CONSUMERS>(CONSUMERS);
    }
    fence_wgmma(block.p, block.d_s);
    UNROLL_FOR (int depth = 0; depth < D; depth += 16)
      wgmma<Major::k, Major::k>(T{}, block.p, memory_.k[block.stage].template slice<Major::k>(depth, consumer * ROWS),
                                q.template slice<Major::k>(depth), depth > 0);
    UNROLL_FOR (int depth = 0; depth < D; depth += 16)
      wgmma<Major::k, Major::k>(T{}, block.d_s, memory_.v[block.stage].template slice<Major::k>(depth, consumer * ROWS),
                                d_o.template slice<Major::k>(depth), depth > 0);
    commit_wgmma();
  }

  DEVICE void finish_scores(KeyBlock& b, int step, int index) {
    wait(&memory_.ready[index % Memory::STAGES], index / Memory::STAGES % 2);
    const int query = step * ROWS;
    if constexpr (D == 128) differentiate_softmax(b.mask, dropout_mask_.drops(), b.key, query, index, b.p, b.d_s);
    else if (dropout_mask_.drops()) differentiate_softmax(b.mask, std::true_type{}, b.key, query, index, b.p, b.d_s);
    else differentiate_softmax(b.mask, std::false_type{}, b.key, query, index, b.p, b.d_s);
  }

  DEVICE void share_gradients(KeyBlock& block) {
    pack_operands(block.mask, block.key, block.p, block.d_s, block.p_pairs, block.d_s_pairs);
    if constexpr (Memory::FUSED) share_score_gradients(block.d_s_pairs);
  }

  // Start the matmuls that add to d_v and d_k, and that for d_q.
  DEVICE void add_gradients(KeyBlock& block, int index) {
    Tile<ROWS, D>&q = memory_.q[index % Memory::STAGES], &d_o = memory_.d_o[index % Memory::STAGES];
    fence_wgmma(block.d_k, block.d_v);
    UNROLL_FOR (int depth = 0; depth < ROWS; depth += 16) {
      wgmma<Major::mn>(T{}, block.d_v, block.p_pairs[depth / 16], d_o.template slice<Major::mn>(depth), true);
      wgmma<Major::mn>(T{}, block.d_k, block.d_s_pairs[depth / 16], q.template slice<Major::mn>(depth), true);
    }
    if constexpr (Memory::FUSED) {
      named_barrier_sync<ALL_CONSUMERS>(CONSUMERS);  // both consumers have shared d_s
      fence_wgmma(block.d_q);
      UNROLL_FOR (int depth = 0; depth < BLOCK; depth += 16)
        wgmma<Major::mn, Major::mn>(T{}, block.d_q, memory_.d_s.template slice<Major::mn>(depth),
                                    memory_.k[block.stage].template slice<Major::mn>(depth, consumer_ * (D / 2)),
                                    depth > 0);
    }
    commit_wgmma();
  }

  DEVICE void finish_gradients(KeyBlock& block, int step, int index) {
    wait_wgmma<0>(block.d_k, block.d_v);
    if (threadIdx.x % 32 == 0) arrive(&memory_.empty[index % Memory::STAGES]);
    if constexpr (Memory::FUSED) {
      keep_in_registers(block.d_q);
      add_to_queries(block.work, block.mask, a_.scale * dropout_mask_.scale(), block.key, step, block.d_q);
      named_barrier_sync<ALL_CONSUMERS>(CONSUMERS);  // both have read d_s
    }
  }

  // Write the 16-bit d_s to shared memory.
  DEVICE void share_score_gradients(const uint32_t (&d_s_pairs)[ROWS / 16][4]) {
    uint32_t thread[1] = {threadIdx.x % 128};
    keep_in_registers(thread);  // so that the compiler does not keep the addresses, which need more of them
    const int row = consumer_ * ROWS + (int)(thread[0] / 32 * 16 + thread[0] % 16), half = (int)(thread[0] % 32 / 16);
    UNROLL_FOR (int column = 0; column < ROWS; column += 16)
      store_matrices(memory_.d_s.at(row, column + half * 8), d_s_pairs[column / 16]);
    fence_proxy();
  }

  // Recompute probabilities from scores, 0 where dropped, and compute d_s = p (d_p - delta). Conditions are constants,
  // or branches around several elements: one per element would cost as much as the arithmetic. With D = 128 `drops` is
  // a bool and the branches are around fewer elements, or the compiler would spill registers.
  template <class Condition>
  DEVICE void differentiate_softmax(const AttentionMask& mask, Condition drops, int key, int query, int index,
                                    float (&p)[ROWS / 2], float (&d_s)[ROWS / 2]) const {
    constexpr int CHUNK = D == 128 ? 4 : 16;
    const float scale = a_.scale * LOG2_E;
    const Statistics* const statistics = memory_.statistics[index % Memory::STAGES];
    const bool limited = mask.limits(query, ROWS, key, BLOCK);
    key += consumer_ * ROWS;
    uint32_t kept = KeptElements::ALL;
    UNROLL_FOR (int first = 0; first < ROWS / 2; first += CHUNK) {
      if (drops && first % 16 == 0)
        kept = dropout_mask_.template kept<true>(key + warp_row(), query + 2 * first).in_one_register();
      UNROLL_FOR (int i = first; i < first + CHUNK; ++i) {
        const Statistics& stats = statistics[fragment_column(i)];
        const bool is_kept = kept >> KeptElements::bit(i % 16) & 1;
        const float probability = fast_exp2(p[i] * scale - stats.lse);
        d_s[i] = probability * ((is_kept ? d_s[i] : 0.f) - stats.delta);
        p[i] = is_kept ? probability : 0.f;
      }
      if (limited)
        UNROLL_FOR (int i = first; i < first + CHUNK; ++i)
          if (!mask.reaches(query + fragment_column(i), key + fragment_row(i))) p[i] = d_s[i] = 0;  // may be NaN
    }
  }

  // Pack p and d_s as A operands of wgmma. Beyond the end rows of v may hold NaN: d_s becomes 0 there. Rows of p reach
  // only rows of d_v that are not stored.
  DEVICE void pack_operands(const AttentionMask& mask, int key, const float (&p)[ROWS / 2],
                            const float (&d_s)[ROWS / 2], uint32_t (&p_pairs)[ROWS / 16][4],
                            uint32_t (&d_s_pairs)[ROWS / 16][4]) const {
    UNROLL_FOR (int i = 0; i < ROWS / 4; ++i) {
      p_pairs[i / 4][i % 4] = pack(T{}, p[2 * i], p[2 * i + 1]);
      d_s_pairs[i / 4][i % 4] = pack(T{}, d_s[2 * i], d_s[2 * i + 1]);
    }
    const int rows = mask.length - key - consumer_ * ROWS;
    if (rows < ROWS)
      UNROLL_FOR (int i = 0; i < ROWS / 4; ++i)
        if (fragment_row(2 * i) >= rows) d_s_pairs[i / 4][i % 4] = 0;
  }

  // Add to a step's d_q in shared memory; after the last block of keys, write it, times `factor`, to global memory.
  DEVICE void add_to_queries(const WorkTile& work, const AttentionMask& mask, float factor, int key, int step,
                             float (&d_q)[D / 4]) {
    const int query = step * ROWS, thread = (int)threadIdx.x - (ATTENTION_THREADS - CONSUMERS);
    const bool first = KeyPlan::is_first(mask, key, step), last = KeyPlan::is_last(mask, key, step);
    UNROLL_FOR (int i = 0; i < D / 4; ++i) {
      float& partial = memory_.d_q[step][i][thread];
      if (!first) d_q[i] += partial;
      if (!last) partial = d_q[i];
    }
    if (last)
      store_rows(d_q, factor, factor, work.length - query, gradient(work, 0, query) + consumer_ * (D / 2), stride());
  }

  DEVICE T* gradient(const WorkTile& work, int part, int token) const {
    return (T*)a_.d_qkv + ((work.start + token) * 3 + part) * a_.heads * D + work.head * D;
  }
  DEVICE int64_t stride() const { return (int64_t)3 * a_.heads * D; }

  Memory& memory_;
  const TileScheduler& scheduler_;
  const AttentionBackward& a_;
  const int consumer_;
  DropoutMask dropout_mask_;
  int blocks_ = 0, steps_ = 0;  // processed so far
};

template <class T, int D, int MAX_SEQLEN>
__global__ void __launch_bounds__(ATTENTION_THREADS, 1)
    attention_keys_kernel(const AttentionBackward a, const TileScheduler scheduler,
                          const __grid_constant__ CUtensorMap qkv, const __grid_constant__ CUtensorMap d_o) {
  using Memory = KeyMemory<D, MAX_SEQLEN>;
  static_assert(sizeof(Memory) <= MAX_SHARED_BYTES);
  Memory& memory = shared_memory<Memory>();
  if (threadIdx.x == 0) {
    init_ring(memory.work.full, memory.work.empty, CONSUMERS / 32 + ASSISTING_WARPS);
    init_ring(memory.keys_full, memory.keys_empty);
    init_ring(memory.full, memory.empty);
    for (uint64_t& ready : memory.ready) init(&ready, ASSISTING_WARPS);
    fence_init();
  }
  zero_padding_slots((T*)a.d_qkv, a.cu_seqlens[a.sequences], a.capacity, (int64_t)3 * a.heads * D);
  specialize_warps<Memory::FUSED && COMPUTES_DELTA<D> ? 56 : 40>(
      [&] { load_work<D, MAX_SEQLEN>(memory, scheduler, a, &qkv, &d_o); },
      [&] { KeyConsumer<T, D, MAX_SEQLEN>(memory, scheduler, a).run(); },
      [&] { write_statistics<T, D, MAX_SEQLEN>(memory, scheduler, a); });
}

}  // namespace bertfast::cuda
