// Attention's backward pass over blocks of keys: d_k and d_v, and for a short sequence (FUSED) also d_q, so that one
// work tile computes all gradients of a head in one pass over its scores.
//
// Scores and their gradients are computed transposed, [keys, queries], so that their registers are the A operands of
// the wgmma for d_v and d_k; only a 16-bit copy of d_s goes through shared memory, for d_q.
#pragma once
#include "attention_delta.cuh"

namespace bertfast::cuda {

// The longest sequence whose d_q, in fp32, fits into a block's shared memory.
template <int D>
constexpr int MAX_FUSED_SEQLEN = D == 128 ? 128 : 512;

template <int D, bool FUSED>
struct KeyMemory {
  static constexpr int STAGES = 2, STEPS = MAX_FUSED_SEQLEN<D> / ROWS;
  Tile<BLOCK, D> k, v;
  Tile<ROWS, D> q[STAGES], d_o[STAGES];
  Tile<BLOCK, ROWS> d_s;
  Statistics statistics[2][ROWS];
  float d_q[FUSED ? STEPS : 1][D / 4][CONSUMERS];  // [step][register][thread]
  uint64_t keys_full, keys_empty, full[STAGES], empty[STAGES];
};

// The range of queries that attend to a block of keys, in steps of ROWS.
struct KeyPlan {
  int first_step, end_step;

  DEVICE KeyPlan(const AttentionMask& mask, int key)
      : first_step(mask.q_begin(key) / ROWS),
        end_step(ceil_div(mask.q_end(key + BLOCK < mask.length ? key + BLOCK : mask.length), ROWS)) {}
};

template <int D, bool FUSED>
DEVICE void load_work(KeyMemory<D, FUSED>& memory, const TileScheduler& scheduler, const AttentionBackward& a,
                      const CUtensorMap* qkv, const CUtensorMap* d_o) {
  using Memory = KeyMemory<D, FUSED>;
  int blocks = 0, steps = 0;  // loaded so far
  for (int index = (int)blockIdx.x; index < scheduler.count; index += (int)gridDim.x) {
    const WorkTile work = scheduler[index];
    const AttentionMask mask(a, work.length);
    for (int key = work.first; key < work.end; key += BLOCK, ++blocks) {
      wait(&memory.keys_empty, (blocks + 1) % 2);
      arrive_expecting(&memory.keys_full, 2 * Tile<BLOCK, D>::BYTES);
      load_tile(memory.k, qkv, &memory.keys_full, a.heads + work.head, work.start + key);
      load_tile(memory.v, qkv, &memory.keys_full, 2 * a.heads + work.head, work.start + key);
      const KeyPlan plan(mask, key);
      for (int step = plan.first_step; step < plan.end_step; ++step, ++steps) {
        const int stage = steps % Memory::STAGES;
        wait(&memory.empty[stage], (steps / Memory::STAGES + 1) % 2);
        arrive_expecting(&memory.full[stage], 2 * Tile<ROWS, D>::BYTES);
        load_tile(memory.q[stage], qkv, &memory.full[stage], work.head, work.start + step * ROWS);
        load_tile(memory.d_o[stage], d_o, &memory.full[stage], work.head, work.start + step * ROWS);
      }
    }
  }
}

template <class T, int D, bool FUSED>
class KeyConsumer {
 public:
  using Memory = KeyMemory<D, FUSED>;

  DEVICE KeyConsumer(Memory& memory, const TileScheduler& scheduler, const AttentionBackward& a)
      : memory_(memory), scheduler_(scheduler), a_(a), consumer_(consumer_index()) {}

  DEVICE void run() {
    for (int index = (int)blockIdx.x; index < scheduler_.count; index += (int)gridDim.x) {
      const WorkTile work = scheduler_[index];
      for (int key = work.first; key < work.end; key += BLOCK, ++blocks_) differentiate(work, key);
    }
  }

 private:
  // Compute d_k and d_v of a block of keys, and its contribution to d_q.
  DEVICE void differentiate(const WorkTile& work, int key) {
    const AttentionMask mask(a_, work.length);
    const KeyPlan plan(mask, key);
    const AttentionDropoutMask dropout_mask(a_.dropout, work.sequence, work.head);
    float d_k[D / 2] = {}, d_v[D / 2] = {};
    read_statistics(work, plan.first_step, steps_);
    wait(&memory_.keys_full, blocks_ % 2);
    if (key + BLOCK > work.length) {
      zero_rows(memory_.k, work.length - key);
      fence_proxy();
    }
    named_barrier_sync(ALL_CONSUMERS, CONSUMERS);  // the statistics have been written too
    for (int step = plan.first_step; step < plan.end_step; ++step, ++steps_) {
      const int stage = steps_ % Memory::STAGES, query = step * ROWS;
      Tile<ROWS, D>&q = memory_.q[stage], &d_o = memory_.d_o[stage];
      wait(&memory_.full[stage], steps_ / Memory::STAGES % 2);
      if (query + ROWS > work.length) {
        zero_rows(q, work.length - query), zero_rows(d_o, work.length - query);
        fence_proxy();
        named_barrier_sync(ALL_CONSUMERS, CONSUMERS);
      }
      float p[ROWS / 2], d_s[ROWS / 2];
      compute_scores(q, d_o, p, d_s);
      uint32_t p_pairs[ROWS / 16][4], d_s_pairs[ROWS / 16][4];
      recompute_probabilities(work, mask, dropout_mask, key, query, p, d_s, p_pairs, d_s_pairs);
      share_score_gradients(d_s_pairs);
      float d_q[D / 4];
      if constexpr (FUSED) fence_wgmma(d_q);
      fence_wgmma(d_k, d_v);
      UNROLL_FOR (int depth = 0; depth < ROWS; depth += 16) {
        wgmma<Major::mn>(T{}, d_v, p_pairs[depth / 16], d_o.template slice<Major::mn>(depth), true);
        wgmma<Major::mn>(T{}, d_k, d_s_pairs[depth / 16], q.template slice<Major::mn>(depth), true);
      }
      if constexpr (FUSED)
        UNROLL_FOR (int depth = 0; depth < BLOCK; depth += 16)
          wgmma<Major::mn, Major::mn>(T{}, d_q, memory_.d_s.template slice<Major::mn>(depth),
                                      memory_.k.template slice<Major::mn>(depth, consumer_ * (D / 2)), depth > 0);
      commit_wgmma();
      if (step + 1 < plan.end_step) read_statistics(work, step + 1, steps_ + 1);
      wait_wgmma<0>(d_k, d_v);
      if (threadIdx.x % 32 == 0) arrive(&memory_.empty[stage]);
      if constexpr (FUSED) {
        keep_in_registers(d_q);
        add_to_queries(work, mask, key, step, d_q);
      }
      named_barrier_sync(ALL_CONSUMERS, CONSUMERS);  // d_s has been read, and the next statistics are written
    }
    if (threadIdx.x % 32 == 0) arrive(&memory_.keys_empty);
    const int row = key + consumer_ * ROWS;
    const float dropout_scale = dropout_mask.drops() ? dropout_mask.scale() : 1.f;
    store_rows(d_k, a_.scale, a_.scale, work.length - row, gradient(work, 1, row), stride());
    store_rows(d_v, dropout_scale, dropout_scale, work.length - row, gradient(work, 2, row), stride());
  }

  // Compute p = k qᵀ, the scores, and d_s = v d_oᵀ, the gradients of the probabilities.
  DEVICE void compute_scores(const Tile<ROWS, D>& q, const Tile<ROWS, D>& d_o, float (&p)[ROWS / 2],
                             float (&d_s)[ROWS / 2]) const {
    fence_wgmma(p, d_s);
    UNROLL_FOR (int depth = 0; depth < D; depth += 16)
      wgmma<Major::k, Major::k>(T{}, p, memory_.k.template slice<Major::k>(depth, consumer_ * ROWS),
                                q.template slice<Major::k>(depth), depth > 0);
    commit_wgmma();
    UNROLL_FOR (int depth = 0; depth < D; depth += 16)
      wgmma<Major::k, Major::k>(T{}, d_s, memory_.v.template slice<Major::k>(depth, consumer_ * ROWS),
                                d_o.template slice<Major::k>(depth), depth > 0);
    commit_wgmma();
    wait_wgmma<0>(p, d_s);
  }

  // Write the 16-bit d_s to shared memory, and wait until both consumers have.
  DEVICE void share_score_gradients(const uint32_t (&d_s_pairs)[ROWS / 16][4]) {
    UNROLL_FOR (int column = 0; column < ROWS; column += 16)
      store_matrices(memory_.d_s.at(consumer_ * ROWS + warp_row() + (int)threadIdx.x % 16,
                                    column + (int)threadIdx.x % 32 / 16 * 8),
                     d_s_pairs[column / 16]);
    fence_proxy();
    named_barrier_sync(ALL_CONSUMERS, CONSUMERS);
  }

  // Recompute probabilities from scores, and compute d_s = p (d_p - delta); pack both as A operands of wgmma.
  DEVICE void recompute_probabilities(const WorkTile& work, const AttentionMask& mask,
                                      const AttentionDropoutMask& dropout_mask, int key, int query,
                                      float (&p)[ROWS / 2], float (&d_s)[ROWS / 2], uint32_t (&p_pairs)[ROWS / 16][4],
                                      uint32_t (&d_s_pairs)[ROWS / 16][4]) const {
    const float scale = a_.scale * LOG2_E, inv_length = 1.f / (float)work.length;
    const float dropout_scale = dropout_mask.drops() ? dropout_mask.scale() : 1.f;
    const bool full = mask.is_full_block(query, ROWS, key, BLOCK);
    const Statistics* const statistics = memory_.statistics[steps_ % 2];
    UNROLL_FOR (int column = 0; column < ROWS; column += 32) {
      uint32_t kept = ~0u;
      if (dropout_mask.drops()) kept = dropout_mask.kept<true>(key + consumer_ * ROWS + warp_row(), query + column);
      UNROLL_FOR (int i = column / 2; i < column / 2 + 16; ++i) {
        const Statistics& stats = statistics[fragment_column(i)];
        float probability = fast_exp2(p[i] * scale - stats.lse) * inv_length, d = d_s[i] * dropout_scale;
        if (!(kept >> i % 16 & 1)) d = 0;
        d = probability * (d - stats.delta);
        if (!full && !mask.attends(query + fragment_column(i), key + consumer_ * ROWS + fragment_row(i)))
          probability = d = 0;  // masked elements may be NaN
        p[i] = kept >> i % 16 & 1 ? probability : 0.f;
        d_s[i] = d;
      }
    }
    UNROLL_FOR (int i = 0; i < ROWS / 4; ++i) {
      p_pairs[i / 4][i % 4] = pack(T{}, p[2 * i], p[2 * i + 1]);
      d_s_pairs[i / 4][i % 4] = pack(T{}, d_s[2 * i], d_s[2 * i + 1]);
    }
  }

  // Load the statistics of a step's queries into buffer index % 2; they are read after the next named barrier.
  DEVICE void read_statistics(const WorkTile& work, int step, int index) {
    const int row = (int)threadIdx.x - (ATTENTION_THREADS - CONSUMERS), query = step * ROWS + row;
    if (row >= ROWS) return;
    const int64_t slot = work.head * a_.capacity + work.start + query;
    memory_.statistics[index % 2][row] =
        query < work.length ? Statistics{a_.lse[slot], a_.delta[slot]} : Statistics{INFINITY, 0};
  }

  // Add to a step's d_q in shared memory; after the last block of keys, write it to global memory.
  DEVICE void add_to_queries(const WorkTile& work, const AttentionMask& mask, int key, int step, float (&d_q)[D / 4]) {
    const int query = step * ROWS, thread = (int)threadIdx.x - (ATTENTION_THREADS - CONSUMERS);
    const int q_end = query + ROWS < work.length ? query + ROWS : work.length;
    const bool first = key < mask.kv_begin(query) / BLOCK * BLOCK + BLOCK;
    const bool last = key + BLOCK >= mask.kv_end(q_end);
    UNROLL_FOR (int i = 0; i < D / 4; ++i) {
      float& partial = memory_.d_q[step][i][thread];
      if (!first) d_q[i] += partial;
      if (!last) partial = d_q[i];
    }
    if (last)
      store_rows(d_q, a_.scale, a_.scale, work.length - query, gradient(work, 0, query) + consumer_ * (D / 2),
                 stride());
  }

  DEVICE T* gradient(const WorkTile& work, int part, int token) const {
    return (T*)a_.d_qkv + ((work.start + token) * 3 + part) * a_.heads * D + work.head * D;
  }
  DEVICE int64_t stride() const { return (int64_t)3 * a_.heads * D; }

  Memory& memory_;
  const TileScheduler& scheduler_;
  const AttentionBackward& a_;
  const int consumer_;
  int blocks_ = 0, steps_ = 0;  // processed so far
};

template <class T, int D, bool FUSED>
__global__ void __launch_bounds__(ATTENTION_THREADS, 1)
    attention_keys_kernel(const AttentionBackward a, const TileScheduler scheduler,
                          const __grid_constant__ CUtensorMap qkv, const __grid_constant__ CUtensorMap d_o) {
  using Memory = KeyMemory<D, FUSED>;
  static_assert(sizeof(Memory) <= MAX_SHARED_BYTES);
  Memory& memory = shared_memory<Memory>();
  if (threadIdx.x == 0) {
    init(&memory.keys_full, 1);
    init(&memory.keys_empty, CONSUMERS / 32);
    for (int stage = 0; stage < Memory::STAGES; ++stage) {
      init(&memory.full[stage], 1);
      init(&memory.empty[stage], CONSUMERS / 32);
    }
    fence_init();
  }
  zero_padding_slots((T*)a.d_qkv, a.cu_seqlens[a.sequences], a.capacity, (int64_t)3 * a.heads * D);
  specialize_warps([&] { load_work<D, FUSED>(memory, scheduler, a, &qkv, &d_o); },
                   [&] { KeyConsumer<T, D, FUSED>(memory, scheduler, a).run(); });
}

}  // namespace bertfast::cuda
