#include "attention.cuh"

namespace bertfast::cuda {

// Stages of the K/V ring buffer. If all K/V tiles of a sequence fit, they are loaded once for all of its queries.
template <int D>
constexpr int FORWARD_STAGES = D == 32   ? 8
                               : D == 64 ? 6
                                         : 2;
template <int D>
constexpr int MAX_WHOLE_SEQLEN = FORWARD_STAGES<D> * BLOCK < 512 ? FORWARD_STAGES<D> * BLOCK : 512;

template <int D>
struct ForwardMemory {
  static constexpr int STAGES = FORWARD_STAGES<D>;
  Tile<BLOCK, D> k[STAGES], v[STAGES];
  Tile<ROWS, D> q[2][2];  // [consumer][buffer]
  uint64_t full[STAGES], empty[STAGES], q_full[2][2], q_empty[2][2];
};

// The range of key tiles that a work tile's queries attend to, and the number of rounds of 2 x ROWS queries.
struct ForwardPlan {
  int first_tile, end_tile, rounds;

  DEVICE ForwardPlan(const WorkTile& work, const AttentionMask& mask)
      : first_tile(mask.kv_begin(work.first) / BLOCK),
        end_tile(ceil_div(mask.kv_end(work.end), BLOCK)),
        rounds(ceil_div(work.end - work.first, BLOCK)) {}
};

// The producer: loads Q and K/V tiles of every work tile of this block.
template <int D>
DEVICE void load_work(ForwardMemory<D>& memory, const TileScheduler& scheduler, const AttentionForward& a,
                      const CUtensorMap* map) {
  using Memory = ForwardMemory<D>;
  int tiles = 0, rounds = 0;  // loaded so far
  for (int index = (int)blockIdx.x; index < scheduler.count; index += (int)gridDim.x) {
    const WorkTile work = scheduler[index];
    if (work.is_empty()) continue;
    const ForwardPlan plan(work, AttentionMask(a, work.length));
    const auto load_queries = [&](int round) {
      for (int consumer = 0; consumer < 2; ++consumer) {
        const int slot = rounds % 2;
        wait(&memory.q_empty[consumer][slot], (rounds / 2 + 1) % 2);
        arrive_expecting(&memory.q_full[consumer][slot], Tile<ROWS, D>::BYTES);
        load_tile(memory.q[consumer][slot], map, &memory.q_full[consumer][slot], work.head,
                  work.start + work.first + (2 * round + consumer) * ROWS);
      }
      ++rounds;
    };
    load_queries(0);
    for (int tile = plan.first_tile; tile < plan.end_tile; ++tile, ++tiles) {
      const int stage = tiles % Memory::STAGES;
      wait(&memory.empty[stage], (tiles / Memory::STAGES + 1) % 2);
      arrive_expecting(&memory.full[stage], 2 * Tile<BLOCK, D>::BYTES);
      const int64_t token = work.start + (int64_t)tile * BLOCK;
      load_tile(memory.k[stage], map, &memory.full[stage], a.heads + work.head, token);
      load_tile(memory.v[stage], map, &memory.full[stage], 2 * a.heads + work.head, token);
    }
    for (int round = 1; round < plan.rounds; ++round) load_queries(round);
  }
}

// Online softmax (Milakov and Gimelshein, 2018) of the two query rows that a thread holds: maximum and sum so far.
struct SoftmaxState {
  float m_i[2] = {-INFINITY, -INFINITY}, l_i[2] = {};
};

// Replace scores by unnormalised probabilities relative to the new row maximum, and rescale `sums`, the output so far.
// Registers with i / 2 % 2 == h belong to the thread's row h; four adjacent lanes share a row.
template <int R>
DEVICE void online_softmax(float (&scores)[BLOCK / 2], float scale, SoftmaxState& state, float (&sums)[R]) {
  UNROLL_FOR (int h = 0; h < 2; ++h) {
    float m_new = state.m_i[h];
    UNROLL_FOR (int i = 0; i < BLOCK / 2; ++i)
      if (i / 2 % 2 == h) m_new = fmaxf(m_new, scores[i]);
    m_new = fmaxf(m_new, __shfl_xor_sync(~0u, m_new, 1));
    m_new = fmaxf(m_new, __shfl_xor_sync(~0u, m_new, 2));
    const float reference = m_new == -INFINITY ? 0.f : m_new;  // all masked so far: -inf - -inf is NaN
    const float alpha = fast_exp2((state.m_i[h] - reference) * scale), offset = reference * scale;
    state.m_i[h] = m_new, state.l_i[h] *= alpha;
    UNROLL_FOR (int i = 0; i < BLOCK / 2; ++i)
      if (i / 2 % 2 == h) {
        scores[i] = fast_exp2(scores[i] * scale - offset);
        state.l_i[h] += scores[i];
      }
    UNROLL_FOR (int i = 0; i < R; ++i)
      if (i / 2 % 2 == h) sums[i] *= alpha;
  }
}

// The consumers: each computes the output of ROWS queries per round.
// Longer than other functions: the compiler's output (SASS) changed when it was split.
template <class T, int D>
DEVICE void attend(ForwardMemory<D>& memory, const TileScheduler& scheduler, const AttentionForward& a) {
  using Memory = ForwardMemory<D>;
  const int consumer = consumer_index();
  const float scale = a.scale * LOG2_E;
  int tiles = 0, rounds = 0;  // consumed so far
  for (int index = (int)blockIdx.x; index < scheduler.count; index += (int)gridDim.x) {
    const WorkTile work = scheduler[index];
    if (work.is_empty()) continue;
    const AttentionMask mask(a, work.length);
    const ForwardPlan plan(work, mask);
    const AttentionDropoutMask dropout_mask(a.dropout, work.sequence, work.head);
    for (int round = 0; round < plan.rounds; ++round, ++rounds) {
      const int slot = rounds % 2, query = work.first + (2 * round + consumer) * ROWS;
      const int queries = work.end - query;  // may exceed ROWS, or be negative
      SoftmaxState state;
      float sums[D / 2] = {};
      wait(&memory.q_full[consumer][slot], rounds / 2 % 2);
      for (int tile = plan.first_tile; tile < plan.end_tile; ++tile) {
        const int use = tiles + tile - plan.first_tile, stage = use % Memory::STAGES, key = tile * BLOCK;
        wait(&memory.full[stage], use / Memory::STAGES % 2);
        if (round == 0 && key + BLOCK > work.length) {
          zero_rows(memory.v[stage], work.length - key);
          fence_proxy();
          named_barrier_sync(ALL_CONSUMERS, CONSUMERS);
        }
        if (queries > 0 && key < mask.kv_end(query + ROWS) && key + BLOCK > mask.kv_begin(query)) {
          float scores[BLOCK / 2];
          fence_wgmma(scores);
          UNROLL_FOR (int depth = 0; depth < D; depth += 16)
            wgmma<Major::k, Major::k>(T{}, scores, memory.q[consumer][slot].template slice<Major::k>(depth),
                                      memory.k[stage].template slice<Major::k>(depth), depth > 0);
          commit_wgmma();
          wait_wgmma<0>(scores);
          if (!mask.is_full_block(query, ROWS, key, BLOCK))
            UNROLL_FOR (int i = 0; i < BLOCK / 2; ++i)
              if (!mask.attends(query + fragment_row(i), key + fragment_column(i))) scores[i] = -INFINITY;
          online_softmax(scores, scale, state, sums);
          if (dropout_mask.drops())
            UNROLL_FOR (int column = 0; column < BLOCK; column += 32) {
              const uint32_t kept = dropout_mask.kept<false>(query + warp_row(), key + column);
              UNROLL_FOR (int i = 0; i < 16; ++i)
                if (!(kept >> i & 1)) scores[column / 2 + i] = 0;
            }
          uint32_t p[BLOCK / 16][4];
          UNROLL_FOR (int i = 0; i < BLOCK / 4; ++i) p[i / 4][i % 4] = pack(T{}, scores[2 * i], scores[2 * i + 1]);
          fence_wgmma(sums);
          UNROLL_FOR (int depth = 0; depth < BLOCK; depth += 16)
            wgmma<Major::mn>(T{}, sums, p[depth / 16], memory.v[stage].template slice<Major::mn>(depth), true);
          commit_wgmma();
          wait_wgmma<0>(sums);
        }
        if (round + 1 == plan.rounds && threadIdx.x % 32 == 0) arrive(&memory.empty[stage]);
      }
      if (threadIdx.x % 32 == 0) arrive(&memory.q_empty[consumer][slot]);
      if (queries <= 0) continue;
      const int64_t token = work.start + query;
      UNROLL_FOR (int h = 0; h < 2; ++h) {
        state.l_i[h] += __shfl_xor_sync(~0u, state.l_i[h], 1);
        state.l_i[h] += __shfl_xor_sync(~0u, state.l_i[h], 2);
        const int row = fragment_row(2 * h);
        if (row < queries && threadIdx.x % 4 == 0)
          a.lse[work.head * a.capacity + token + row] = state.m_i[h] * scale + log2f(state.l_i[h] / (float)work.length);
      }
      const float dropout_scale = dropout_mask.drops() ? dropout_mask.scale() : 1.f;
      store_rows(sums, dropout_scale / state.l_i[0], dropout_scale / state.l_i[1], queries,
                 (T*)a.o + (token * a.heads + work.head) * D, (int64_t)a.heads * D);
    }
    tiles += plan.end_tile - plan.first_tile;
  }
}

template <class T, int D>
__global__ void __launch_bounds__(ATTENTION_THREADS, 1)
    attention_forward_kernel(const AttentionForward a, const TileScheduler scheduler,
                             const __grid_constant__ CUtensorMap qkv) {
  using Memory = ForwardMemory<D>;
  static_assert(sizeof(Memory) <= MAX_SHARED_BYTES);
  Memory& memory = shared_memory<Memory>();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Memory::STAGES; ++stage) {
      init(&memory.full[stage], 1);
      init(&memory.empty[stage], CONSUMERS / 32);
    }
    for (int i = 0; i < 4; ++i) {
      init(&memory.q_full[i / 2][i % 2], 1);
      init(&memory.q_empty[i / 2][i % 2], CONSUMERS / 32 / 2);
    }
    fence_init();
  }
  zero_padding_slots((T*)a.o, a.cu_seqlens[a.sequences], a.capacity, (int64_t)a.heads * D);
  specialize_warps([&] { load_work<D>(memory, scheduler, a, &qkv); }, [&] { attend<T, D>(memory, scheduler, a); });
}

void attention_forward(const AttentionForward& a, Stream stream) {
  if (a.capacity == 0) return;
  with_attention_shape(a, [&]<class T, int D>(T, std::integral_constant<int, D>) {
    const TileScheduler scheduler = TileScheduler::of(a, a.max_seqlen_bound <= MAX_WHOLE_SEQLEN<D>);
    launch(attention_forward_kernel<T, D>, persistent_blocks(scheduler), ATTENTION_THREADS, sizeof(ForwardMemory<D>),
           stream, a, scheduler, rows_map<D>(a.qkv, a.capacity, 3 * a.heads, a.stride));
  });
}

}  // namespace bertfast::cuda
