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
  WorkRing work;
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

// The tiles that a consumer's queries from `query` on attend to, of those of the plan; none if there are no queries.
struct TileRange {
  int first, end;

  DEVICE TileRange(const ForwardPlan& plan, const WorkTile& work, const AttentionMask& mask, int query)
      : first(plan.first_tile), end(plan.first_tile) {
    if (query >= work.end) return;
    const int reached = mask.kv_begin(query) / BLOCK, unreached = ceil_div(mask.kv_end(query + ROWS), BLOCK);
    first = reached > plan.first_tile ? reached : plan.first_tile;
    end = unreached < plan.end_tile ? unreached : plan.end_tile;
  }
};

// The producer: loads Q and K/V tiles of every work tile of this block.
template <int D>
DEVICE void load_work(ForwardMemory<D>& memory, const TileScheduler& scheduler, const AttentionForward& a,
                      const CUtensorMap* map) {
  using Memory = ForwardMemory<D>;
  int tiles = 0, rounds = 0;  // loaded so far
  for (int turn = 0; scheduler.has(turn); ++turn) {
    const WorkTile work = scheduler[turn];
    memory.work.put(turn, work);
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

// Online softmax (Milakov and Gimelshein, 2018) of the two query rows that a thread holds: maximum and sum so far, and
// the factor by which the last tile of keys changed what was summed before.
struct SoftmaxState {
  float m_i[2] = {-INFINITY, -INFINITY}, l_i[2] = {}, alpha[2] = {};
};

// Replace scores by unnormalised probabilities relative to the new row maximum.
// Registers with i / 2 % 2 == h belong to the thread's row h; four adjacent lanes share a row.
DEVICE void online_softmax(float (&scores)[BLOCK / 2], float scale, SoftmaxState& state) {
  UNROLL_FOR (int h = 0; h < 2; ++h) {
    float m_new = state.m_i[h];
    UNROLL_FOR (int i = 0; i < BLOCK / 2; ++i)
      if (i / 2 % 2 == h) m_new = fmaxf(m_new, scores[i]);
    m_new = fmaxf(m_new, __shfl_xor_sync(~0u, m_new, 1));
    m_new = fmaxf(m_new, __shfl_xor_sync(~0u, m_new, 2));
    const float reference = m_new == -INFINITY ? 0.f : m_new;  // all masked so far: -inf - -inf is NaN
    const float offset = reference * scale;
    state.alpha[h] = fast_exp2((state.m_i[h] - reference) * scale);
    state.m_i[h] = m_new, state.l_i[h] *= state.alpha[h];
    UNROLL_FOR (int i = 0; i < BLOCK / 2; ++i)
      if (i / 2 % 2 == h) {
        scores[i] = fast_exp2(scores[i] * scale - offset);
        state.l_i[h] += scores[i];
      }
  }
}

// Set masked scores to -inf. Rows beyond the sequence's end keep their scores: they are not stored.
DEVICE void mask_scores(const AttentionMask& mask, int query, int key, float (&scores)[BLOCK / 2]) {
  if (key + BLOCK > mask.length) fill_columns(scores, mask.length - key, -INFINITY);
  if (mask.limits(query, ROWS, key, BLOCK))
    UNROLL_FOR (int i = 0; i < BLOCK / 2; ++i)
      if (!mask.reaches(query + fragment_row(i), key + fragment_column(i))) scores[i] = -INFINITY;
}

// A consumer: computes the output of ROWS queries per round. The tensor cores compute the scores of the next tile of
// keys while this tile's dropout mask is drawn, and add its values while the next one's softmax is computed.
template <class T, int D>
class QueryConsumer {
 public:
  using Memory = ForwardMemory<D>;
  using DropoutMask = AttentionDropoutMask<D != 128>;

  DEVICE QueryConsumer(Memory& memory, const TileScheduler& scheduler, const AttentionForward& a)
      : memory_(memory), scheduler_(scheduler), a_(a), consumer_(consumer_index()), dropout_mask_(a.dropout) {}

  DEVICE void run() {
    for (int turn = 0; scheduler_.has(turn); ++turn) {
      const WorkTile work = uniform(memory_.work.take(turn));
      if (work.is_empty()) continue;
      const AttentionMask mask(a_, work.length);
      const ForwardPlan plan(work, mask);
      dropout_mask_.select(work);
      for (int round = 0; round < plan.rounds; ++round, ++rounds_) attend(work, mask, plan, round);
      tiles_ += plan.end_tile - plan.first_tile;
    }
  }

 private:
  DEVICE void attend(const WorkTile& work, const AttentionMask& mask, const ForwardPlan& plan, int round) {
    const int query = work.first + (2 * round + consumer_) * ROWS;
    const TileRange range(plan, work, mask, query);
    const float scale = a_.scale * LOG2_E;
    SoftmaxState state;
    float sums[D / 2] = {}, scores[BLOCK / 2];
    int tile = plan.first_tile;
    wait(&memory_.q_full[consumer_][rounds_ % 2], rounds_ / 2 % 2);
    for (; tile < range.first; ++tile) skip_tile(work, plan, round, tile);
    const auto start_scores = [&](int stage) {
      const auto& q = memory_.q[consumer_][rounds_ % 2];
      fence_wgmma(scores);
      UNROLL_FOR (int depth = 0; depth < D; depth += 16)
        wgmma<Major::k, Major::k>(T{}, scores, q.template slice<Major::k>(depth),
                                  memory_.k[stage].template slice<Major::k>(depth), depth > 0);
      commit_wgmma();
    };
    const auto finish_scores = [&](int key) {
      mask_scores(mask, query, key, scores);
      online_softmax(scores, scale, state);
    };
    uint32_t p[BLOCK / 16][4];
    const auto pack_probabilities = [&](int stage_before) {
      wait_wgmma<0>(sums);  // of the tile before, whose operand p is
      if (tile > range.first) release(plan, round, stage_before);
      UNROLL_FOR (int i = 0; i < D / 2; ++i) sums[i] *= state.alpha[i / 2 % 2];
      UNROLL_FOR (int i = 0; i < BLOCK / 4; ++i) p[i / 4][i % 4] = pack(T{}, scores[2 * i], scores[2 * i + 1]);
      if (D == 128 && dropout_mask_.drops()) drop(query, tile * BLOCK, p);  // later it would spill
    };
    const auto add_values = [&](int stage) {
      if (D != 128 && dropout_mask_.drops()) drop(query, tile * BLOCK, p);
      const auto& v = memory_.v[stage];
      fence_wgmma(sums);
      UNROLL_FOR (int depth = 0; depth < BLOCK; depth += 16)
        wgmma<Major::mn>(T{}, sums, p[depth / 16], v.template slice<Major::mn>(depth), true);
      commit_wgmma();
    };
    if (range.first < range.end) {
      int stage = wait_for_tile(work, plan, round, tile), stage_before = stage;
      start_scores(stage);
      wait_wgmma<0>(scores);
      finish_scores(tile * BLOCK);
      for (; tile + 1 < range.end; ++tile) {
        pack_probabilities(stage_before);
        stage_before = stage, stage = wait_for_tile(work, plan, round, tile + 1);
        start_scores(stage);
        add_values(stage_before);
        wait_wgmma<1>(scores);
        finish_scores((tile + 1) * BLOCK);
      }
      pack_probabilities(stage_before);
      add_values(stage);
      wait_wgmma<0>(sums);
      release(plan, round, stage), ++tile;
    }
    for (; tile < plan.end_tile; ++tile) skip_tile(work, plan, round, tile);
    if (threadIdx.x % 32 == 0) arrive(&memory_.q_empty[consumer_][rounds_ % 2]);
    if (query < work.end) store(work, query, state, sums);
  }

  // Wait until a tile of keys is in shared memory, and return its stage.
  DEVICE int wait_for_tile(const WorkTile& work, const ForwardPlan& plan, int round, int tile) {
    const int stage = uniform(use_of(plan, tile) % Memory::STAGES);
    wait_for_stage(work, plan, round, tile, stage);
    return stage;
  }

  // Wait for a tile of keys that this consumer's queries do not attend to, and release it. A lane that is late would
  // miss the phase of a stage that lane 0 releases and the producer fills again, and wait forever. Where a tile is
  // read, lanes wait for each other in wgmma; here they do in the shuffle, which is after the wait for that reason. It
  // also orders the wait for q before its release if there are no queries, because every plan has a tile.
  DEVICE void skip_tile(const WorkTile& work, const ForwardPlan& plan, int round, int tile) {
    const int stage = use_of(plan, tile) % Memory::STAGES;
    wait_for_stage(work, plan, round, tile, stage);
    release(plan, round, uniform(stage));
  }

  // Wait until a stage holds a tile of keys. In the first round both consumers zero the rows beyond the sequence's end.
  DEVICE void wait_for_stage(const WorkTile& work, const ForwardPlan& plan, int round, int tile, int stage) {
    wait(&memory_.full[stage], use_of(plan, tile) / Memory::STAGES % 2);
    if (round == 0 && (tile + 1) * BLOCK > work.length) {
      zero_rows(memory_.v[stage], work.length - tile * BLOCK);
      fence_proxy();
      named_barrier_sync<ALL_CONSUMERS>(CONSUMERS);
    }
  }

  // The number of tiles that this block loads before one of the plan's.
  DEVICE int use_of(const ForwardPlan& plan, int tile) const { return tiles_ + tile - plan.first_tile; }

  // After the last round, let the producer overwrite a stage.
  DEVICE void release(const ForwardPlan& plan, int round, int stage) {
    if (round + 1 == plan.rounds && threadIdx.x % 32 == 0) arrive(&memory_.empty[stage]);
  }

  // Set dropped probabilities to 0.
  DEVICE void drop(int query, int key, uint32_t (&p)[BLOCK / 16][4]) const {
    UNROLL_FOR (int column = 0; column < BLOCK; column += 32) {
      const KeptElements kept = dropout_mask_.template kept<false>(query + warp_row(), key + column);
      UNROLL_FOR (int i = 0; i < 8; ++i) p[column / 16 + i / 4][i % 4] &= kept.pair(i);
    }
  }

  DEVICE void store(const WorkTile& work, int query, SoftmaxState& state, const float (&sums)[D / 2]) const {
    const int64_t token = work.start + query;
    UNROLL_FOR (int h = 0; h < 2; ++h) {
      state.l_i[h] += __shfl_xor_sync(~0u, state.l_i[h], 1);
      state.l_i[h] += __shfl_xor_sync(~0u, state.l_i[h], 2);
      const int row = fragment_row(2 * h);
      if (query + row < work.end && threadIdx.x % 4 == 0)
        a_.lse[work.head * a_.capacity + token + row] =
            state.m_i[h] * (a_.scale * LOG2_E) + fast_log2(state.l_i[h] * fast_reciprocal((float)work.length));
    }
    const float factor = dropout_mask_.scale();
    store_rows(sums, factor * fast_reciprocal(state.l_i[0]), factor * fast_reciprocal(state.l_i[1]), work.end - query,
               (T*)a_.o + (token * a_.heads + work.head) * D, (int64_t)a_.heads * D);
  }

  Memory& memory_;
  const TileScheduler& scheduler_;
  const AttentionForward& a_;
  const int consumer_;
  DropoutMask dropout_mask_;
  int tiles_ = 0, rounds_ = 0;  // consumed so far
};

template <class T, int D>
__global__ void __launch_bounds__(ATTENTION_THREADS, 1)
    attention_forward_kernel(const AttentionForward a, const TileScheduler scheduler,
                             const __grid_constant__ CUtensorMap qkv) {
  using Memory = ForwardMemory<D>;
  static_assert(sizeof(Memory) <= MAX_SHARED_BYTES);
  Memory& memory = shared_memory<Memory>();
  if (threadIdx.x == 0) {
    init_ring(memory.work.full, memory.work.empty);
    init_ring(memory.full, memory.empty);
    for (int i = 0; i < 4; ++i) {
      init(&memory.q_full[i / 2][i % 2], 1);
      init(&memory.q_empty[i / 2][i % 2], CONSUMERS / 32 / 2);
    }
    fence_init();
  }
  zero_padding_slots((T*)a.o, a.cu_seqlens[a.sequences], a.capacity, (int64_t)a.heads * D);
  specialize_warps([&] { load_work<D>(memory, scheduler, a, &qkv); },
                   [&] { QueryConsumer<T, D>(memory, scheduler, a).run(); }, [] {});
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
