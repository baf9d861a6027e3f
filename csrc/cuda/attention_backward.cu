// Scores and their gradients are made transposed, [keys, queries]: so they are, in registers, first operands of the
// products that make d_v and d_k, and only the gradient's 16-bit copy goes through shared memory, for d_q. No product is
// added up by two threads, nor in an order that could change.
//
// Where a sequence is short, one item makes d_q, d_k and d_v of a head of it, in one pass over its scores. Of longer
// ones d_q is made by a kernel of its own.
#include "attention.cuh"

namespace bertfast::cuda {

// The longest sequences whose d_q, in fp32, a block has memory for.
template <int D>
constexpr int LONGEST_FUSED = D == 128 ? 128 : 512;

// delta = the sum over a token's head of d_o · o: what softmax's gradient takes from every score of a query.
template <class T, int D>
__global__ void __launch_bounds__(256) delta_kernel(const AttentionBackward a) {
  constexpr int LANES = D / 8;
  const int64_t rows = a.tokens * a.heads, threads = (int64_t)gridDim.x * blockDim.x;
  const int64_t whole = (rows * LANES + 31) / 32 * 32;  // all lanes of a warp take part in the exchange
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < whole; i += threads) {
    const int64_t row = i / LANES;  // token · heads + head
    float sum = 0, o[8], d_o[8];
    if (row < rows) {
      load_8((const T*)a.o + i * 8, o), load_8((const T*)a.d_o + i * 8, d_o);
      UNROLL for (int j = 0; j < 8; ++j) sum += o[j] * d_o[j];
    }
    UNROLL for (int lanes = LANES / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    if (row < rows && i % LANES == 0) a.delta[row % a.heads * a.tokens + row / a.heads] = sum;
  }
}

// A query's log2 of the mean of its exponentials, and its delta; infinite lse where there is no query.
struct Statistics {
  float lse, delta;
};

template <int D, bool FUSED>
struct KeyMemory {
  static constexpr int STAGES = 2, STEPS = LONGEST_FUSED<D> / ROWS;
  Tile<BLOCK, D> k, v;
  Tile<ROWS, D> q[STAGES], d_o[STAGES];
  Tile<BLOCK, ROWS> d_s;
  Statistics statistics[2][ROWS];
  float d_q[FUSED ? STEPS : 1][D / 4][CONSUMERS];  // a thread's own registers
  uint64_t keys_full, keys_empty, full[STAGES], empty[STAGES];
};

// The queries that see a block of keys, in steps of ROWS.
struct KeyPlan {
  int first_step, end_step;

  DEVICE KeyPlan(const Sight& sight, int key)
      : first_step(sight.first_query(key) / ROWS),
        end_step(ceil_div(sight.end_query(key + BLOCK < sight.length ? key + BLOCK : sight.length), ROWS)) {}
};

template <int D, bool FUSED>
DEVICE void load_items(KeyMemory<D, FUSED>& memory, const Items& items, const AttentionBackward& a,
                       const CUtensorMap* qkv, const CUtensorMap* d_o) {
  using Memory = KeyMemory<D, FUSED>;
  int blocks = 0, steps = 0;  // loaded so far
  for (int number = (int)blockIdx.x; number < items.count; number += (int)gridDim.x) {
    const Item item = items[number];
    const Sight sight(a, item.length);
    for (int key = item.first; key < item.end; key += BLOCK, ++blocks) {
      wait(&memory.keys_empty, (blocks + 1) % 2);
      arrive_expecting(&memory.keys_full, 2 * Tile<BLOCK, D>::BYTES);
      load_tile(memory.k, qkv, &memory.keys_full, a.heads + item.head, item.start + key);
      load_tile(memory.v, qkv, &memory.keys_full, 2 * a.heads + item.head, item.start + key);
      const KeyPlan plan(sight, key);
      for (int step = plan.first_step; step < plan.end_step; ++step, ++steps) {
        const int stage = steps % Memory::STAGES;
        wait(&memory.empty[stage], (steps / Memory::STAGES + 1) % 2);
        arrive_expecting(&memory.full[stage], 2 * Tile<ROWS, D>::BYTES);
        load_tile(memory.q[stage], qkv, &memory.full[stage], item.head, item.start + step * ROWS);
        load_tile(memory.d_o[stage], d_o, &memory.full[stage], item.head, item.start + step * ROWS);
      }
    }
  }
}

template <class T, int D, bool FUSED>
class KeyConsumer {
 public:
  using Memory = KeyMemory<D, FUSED>;

  DEVICE KeyConsumer(Memory& memory, const Items& items, const AttentionBackward& a)
      : memory_(memory), items_(items), a_(a), consumer_(consumer_number()) {}

  DEVICE void run() {
    for (int number = (int)blockIdx.x; number < items_.count; number += (int)gridDim.x) {
      const Item item = items_[number];
      for (int key = item.first; key < item.end; key += BLOCK, ++blocks_) differentiate(item, key);
    }
  }

 private:
  // d_k and d_v of a block of keys, and what it adds to d_q.
  DEVICE void differentiate(const Item& item, int key) {
    const Sight sight(a_, item.length);
    const KeyPlan plan(sight, key);
    const AttentionMask mask(a_.dropout, item.sequence, item.head);
    float d_k[D / 2] = {}, d_v[D / 2] = {};
    read_statistics(item, plan.first_step, steps_);
    wait(&memory_.keys_full, blocks_ % 2);
    if (key + BLOCK > item.length) {
      clear_rows(memory_.k, item.length - key);
      fence_proxy();
    }
    meet(ALL_CONSUMERS, CONSUMERS);  // the statistics are there too
    for (int step = plan.first_step; step < plan.end_step; ++step, ++steps_) {
      const int stage = steps_ % Memory::STAGES, query = step * ROWS;
      Tile<ROWS, D>&q = memory_.q[stage], &d_o = memory_.d_o[stage];
      wait(&memory_.full[stage], steps_ / Memory::STAGES % 2);
      if (query + ROWS > item.length) {
        clear_rows(q, item.length - query), clear_rows(d_o, item.length - query);
        fence_proxy();
        meet(ALL_CONSUMERS, CONSUMERS);
      }
      float p[ROWS / 2], d_s[ROWS / 2];
      fence_products(p, d_s);
      UNROLL for (int depth = 0; depth < D; depth += 16)
        multiply<Major::k, Major::k>(T{}, p, memory_.k.template slice<Major::k>(depth, consumer_ * ROWS),
                                     q.template slice<Major::k>(depth), depth > 0);
      commit_products();
      UNROLL for (int depth = 0; depth < D; depth += 16)
        multiply<Major::k, Major::k>(T{}, d_s, memory_.v.template slice<Major::k>(depth, consumer_ * ROWS),
                                     d_o.template slice<Major::k>(depth), depth > 0);
      commit_products();
      wait_products<0>(p, d_s);
      uint32_t p_pairs[ROWS / 16][4], d_s_pairs[ROWS / 16][4];
      soften(item, sight, mask, key, query, p, d_s, p_pairs, d_s_pairs);
      UNROLL for (int column = 0; column < ROWS; column += 16)
        store_matrices(memory_.d_s.at(consumer_ * ROWS + warp_row() + (int)threadIdx.x % 16,
                                      column + (int)threadIdx.x % 32 / 16 * 8),
                       d_s_pairs[column / 16]);
      fence_proxy();
      meet(ALL_CONSUMERS, CONSUMERS);
      float d_q[D / 4];
      if constexpr (FUSED) fence_products(d_q);
      fence_products(d_k, d_v);
      UNROLL for (int depth = 0; depth < ROWS; depth += 16) {
        multiply<Major::mn>(T{}, d_v, p_pairs[depth / 16], d_o.template slice<Major::mn>(depth), true);
        multiply<Major::mn>(T{}, d_k, d_s_pairs[depth / 16], q.template slice<Major::mn>(depth), true);
      }
      if constexpr (FUSED)
        UNROLL for (int depth = 0; depth < BLOCK; depth += 16)
          multiply<Major::mn, Major::mn>(T{}, d_q, memory_.d_s.template slice<Major::mn>(depth),
                                         memory_.k.template slice<Major::mn>(depth, consumer_ * (D / 2)), depth > 0);
      commit_products();
      if (step + 1 < plan.end_step) read_statistics(item, step + 1, steps_ + 1);
      wait_products<0>(d_k, d_v);
      if (threadIdx.x % 32 == 0) arrive(&memory_.empty[stage]);
      if constexpr (FUSED) {
        pin(d_q);
        add_to_queries(item, sight, key, step, d_q);
      }
      meet(ALL_CONSUMERS, CONSUMERS);  // d_s has been read, and the next statistics are there
    }
    if (threadIdx.x % 32 == 0) arrive(&memory_.keys_empty);
    const int row = key + consumer_ * ROWS;
    const float kept = mask.drops() ? mask.scale() : 1.f;
    store_rows(d_k, a_.scale, a_.scale, item.length - row, gradient(item, 1, row), stride());
    store_rows(d_v, kept, kept, item.length - row, gradient(item, 2, row), stride());
  }

  // Makes probabilities of scores, and of their gradient that of the scores, both as first operands of products.
  DEVICE void soften(const Item& item, const Sight& sight, const AttentionMask& mask, int key, int query,
                     float (&p)[ROWS / 2], float (&d_s)[ROWS / 2], uint32_t (&p_pairs)[ROWS / 16][4],
                     uint32_t (&d_s_pairs)[ROWS / 16][4]) const {
    const float scale = a_.scale * LOG2_E, share = 1.f / (float)item.length;
    const float kept_scale = mask.drops() ? mask.scale() : 1.f;
    const bool whole = sight.is_whole(query, ROWS, key, BLOCK);
    const Statistics* const statistics = memory_.statistics[steps_ % 2];
    UNROLL for (int column = 0; column < ROWS; column += 32) {
      uint32_t kept = ~0u;
      if (mask.drops()) kept = mask.kept<true>(key + consumer_ * ROWS + warp_row(), query + column);
      UNROLL for (int i = column / 2; i < column / 2 + 16; ++i) {
        const Statistics& known = statistics[fragment_column(i)];
        float probability = fast_exp2(p[i] * scale - known.lse) * share, d = d_s[i] * kept_scale;
        if (!(kept >> i % 16 & 1)) d = 0;
        d = probability * (d - known.delta);
        if (!whole && !sight.sees(query + fragment_column(i), key + consumer_ * ROWS + fragment_row(i)))
          probability = d = 0;  // where nothing is there may be no number
        p[i] = kept >> i % 16 & 1 ? probability : 0.f;
        d_s[i] = d;
      }
    }
    UNROLL for (int i = 0; i < ROWS / 4; ++i) {
      p_pairs[i / 4][i % 4] = pack(T{}, p[2 * i], p[2 * i + 1]);
      d_s_pairs[i / 4][i % 4] = pack(T{}, d_s[2 * i], d_s[2 * i + 1]);
    }
  }

  // Those of a step's queries, for the step counted `number`; they are used after the next meeting.
  DEVICE void read_statistics(const Item& item, int step, int number) {
    const int row = (int)threadIdx.x - (ATTENTION_THREADS - CONSUMERS), query = step * ROWS + row;
    if (row >= ROWS) return;
    const int64_t place = item.head * a_.tokens + item.start + query;
    memory_.statistics[number % 2][row] =
        query < item.length ? Statistics{a_.lse[place], a_.delta[place]} : Statistics{INFINITY, 0};
  }

  // Adds to a step's d_q, or where no more is to come writes it.
  DEVICE void add_to_queries(const Item& item, const Sight& sight, int key, int step, float (&d_q)[D / 4]) {
    const int query = step * ROWS, thread = (int)threadIdx.x - (ATTENTION_THREADS - CONSUMERS);
    const int end_query = query + ROWS < item.length ? query + ROWS : item.length;
    const bool first = key < sight.first_key(query) / BLOCK * BLOCK + BLOCK;
    const bool last = key + BLOCK >= sight.end_key(end_query);
    UNROLL for (int i = 0; i < D / 4; ++i) {
      float& place = memory_.d_q[step][i][thread];
      if (!first) d_q[i] += place;
      if (!last) place = d_q[i];
    }
    if (last)
      store_rows(d_q, a_.scale, a_.scale, item.length - query, gradient(item, 0, query) + consumer_ * (D / 2), stride());
  }

  DEVICE T* gradient(const Item& item, int part, int place) const {
    return (T*)a_.d_qkv + ((item.start + place) * 3 + part) * a_.heads * D + item.head * D;
  }
  DEVICE int64_t stride() const { return (int64_t)3 * a_.heads * D; }

  Memory& memory_;
  const Items& items_;
  const AttentionBackward& a_;
  const int consumer_;
  int blocks_ = 0, steps_ = 0;  // done so far
};

template <class T, int D, bool FUSED>
__global__ void __launch_bounds__(ATTENTION_THREADS, 1)
    attention_keys_kernel(const AttentionBackward a, const Items items,
                          const __grid_constant__ CUtensorMap qkv, const __grid_constant__ CUtensorMap d_o) {
  using Memory = KeyMemory<D, FUSED>;
  static_assert(sizeof(Memory) <= MOST_SHARED);
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
  clear_unused((T*)a.d_qkv, a.cu_seqlens[a.sequences], a.tokens, (int64_t)3 * a.heads * D);
  share_work([&] { load_items<D, FUSED>(memory, items, a, &qkv, &d_o); },
             [&] { KeyConsumer<T, D, FUSED>(memory, items, a).run(); });
}

// Queries of both consumers and, in turn, ROWS keys.
template <int D>
struct QueryMemory {
  static constexpr int STAGES = D == 128 ? 3 : 6;
  Tile<ROWS, D> q[2], d_o[2], k[STAGES], v[STAGES];
  uint64_t q_full, q_empty, full[STAGES], empty[STAGES];
};

template <int D>
DEVICE void load_items(QueryMemory<D>& memory, const Items& items, const AttentionBackward& a, const CUtensorMap* qkv,
                       const CUtensorMap* d_o) {
  using Memory = QueryMemory<D>;
  int loaded = 0, tiles = 0;  // items and tiles so far
  for (int number = (int)blockIdx.x; number < items.count; number += (int)gridDim.x) {
    const Item item = items[number];
    if (item.is_empty()) continue;
    const Sight sight(a, item.length);
    wait(&memory.q_empty, (loaded++ + 1) % 2);
    arrive_expecting(&memory.q_full, 4 * Tile<ROWS, D>::BYTES);
    for (int consumer = 0; consumer < 2; ++consumer) {
      const int64_t token = item.start + item.first + consumer * ROWS;
      load_tile(memory.q[consumer], qkv, &memory.q_full, item.head, token);
      load_tile(memory.d_o[consumer], d_o, &memory.q_full, item.head, token);
    }
    for (int key = sight.first_key(item.first) / ROWS * ROWS; key < sight.end_key(item.end); key += ROWS, ++tiles) {
      const int stage = tiles % Memory::STAGES;
      wait(&memory.empty[stage], (tiles / Memory::STAGES + 1) % 2);
      arrive_expecting(&memory.full[stage], 2 * Tile<ROWS, D>::BYTES);
      load_tile(memory.k[stage], qkv, &memory.full[stage], a.heads + item.head, item.start + key);
      load_tile(memory.v[stage], qkv, &memory.full[stage], 2 * a.heads + item.head, item.start + key);
    }
  }
}

template <class T, int D>
DEVICE void differentiate_queries(QueryMemory<D>& memory, const Items& items, const AttentionBackward& a) {
  using Memory = QueryMemory<D>;
  const int consumer = consumer_number();
  const float scale = a.scale * LOG2_E;
  int done = 0, tiles = 0;  // items and tiles so far
  for (int number = (int)blockIdx.x; number < items.count; number += (int)gridDim.x) {
    const Item item = items[number];
    if (item.is_empty()) continue;
    const Sight sight(a, item.length);
    const AttentionMask mask(a.dropout, item.sequence, item.head);
    const float kept_scale = mask.drops() ? mask.scale() : 1.f, share = 1.f / (float)item.length;
    const int query = item.first + consumer * ROWS;
    Statistics known[2];
    UNROLL for (int h = 0; h < 2; ++h) {
      const int row = query + fragment_row(2 * h);
      const int64_t place = item.head * a.tokens + item.start + row;
      known[h] = row < item.length ? Statistics{a.lse[place], a.delta[place]} : Statistics{INFINITY, 0};
    }
    float d_q[D / 2] = {};
    wait(&memory.q_full, done++ % 2);
    for (int key = sight.first_key(item.first) / ROWS * ROWS; key < sight.end_key(item.end); key += ROWS, ++tiles) {
      const int stage = tiles % Memory::STAGES;
      wait(&memory.full[stage], tiles / Memory::STAGES % 2);
      if (key + ROWS > item.length) {
        clear_rows(memory.k[stage], item.length - key);
        fence_proxy();
        meet(ALL_CONSUMERS, CONSUMERS);
      }
      if (query < item.length && key < sight.end_key(query + ROWS) && key + ROWS > sight.first_key(query)) {
        float p[ROWS / 2], d_s[ROWS / 2];
        fence_products(p, d_s);
        UNROLL for (int depth = 0; depth < D; depth += 16)
          multiply<Major::k, Major::k>(T{}, p, memory.q[consumer].template slice<Major::k>(depth),
                                       memory.k[stage].template slice<Major::k>(depth), depth > 0);
        UNROLL for (int depth = 0; depth < D; depth += 16)
          multiply<Major::k, Major::k>(T{}, d_s, memory.d_o[consumer].template slice<Major::k>(depth),
                                       memory.v[stage].template slice<Major::k>(depth), depth > 0);
        commit_products();
        wait_products<0>(p, d_s);
        const bool whole = sight.is_whole(query, ROWS, key, ROWS);
        UNROLL for (int column = 0; column < ROWS; column += 32) {
          uint32_t kept = ~0u;
          if (mask.drops()) kept = mask.kept<false>(query + warp_row(), key + column);
          UNROLL for (int i = column / 2; i < column / 2 + 16; ++i) {
            const Statistics& mine = known[i / 2 % 2];
            float d = kept >> i % 16 & 1 ? d_s[i] * kept_scale : 0.f;
            d = fast_exp2(p[i] * scale - mine.lse) * share * (d - mine.delta);
            if (!whole && !sight.sees(query + fragment_row(i), key + fragment_column(i))) d = 0;
            d_s[i] = d;
          }
        }
        uint32_t pairs[ROWS / 16][4];
        UNROLL for (int i = 0; i < ROWS / 4; ++i) pairs[i / 4][i % 4] = pack(T{}, d_s[2 * i], d_s[2 * i + 1]);
        fence_products(d_q);
        UNROLL for (int depth = 0; depth < ROWS; depth += 16)
          multiply<Major::mn>(T{}, d_q, pairs[depth / 16], memory.k[stage].template slice<Major::mn>(depth), true);
        commit_products();
        wait_products<0>(d_q);
      }
      if (threadIdx.x % 32 == 0) arrive(&memory.empty[stage]);
    }
    if (threadIdx.x % 32 == 0) arrive(&memory.q_empty);
    store_rows(d_q, a.scale, a.scale, item.length - query,
               (T*)a.d_qkv + ((item.start + query) * 3 * a.heads + item.head) * D, (int64_t)3 * a.heads * D);
  }
}

template <class T, int D>
__global__ void __launch_bounds__(ATTENTION_THREADS, 1)
    attention_queries_kernel(const AttentionBackward a, const Items items,
                             const __grid_constant__ CUtensorMap qkv, const __grid_constant__ CUtensorMap d_o) {
  using Memory = QueryMemory<D>;
  static_assert(sizeof(Memory) <= MOST_SHARED);
  Memory& memory = shared_memory<Memory>();
  if (threadIdx.x == 0) {
    init(&memory.q_full, 1);
    init(&memory.q_empty, CONSUMERS / 32);
    for (int stage = 0; stage < Memory::STAGES; ++stage) {
      init(&memory.full[stage], 1);
      init(&memory.empty[stage], CONSUMERS / 32);
    }
    fence_init();
  }
  share_work([&] { load_items<D>(memory, items, a, &qkv, &d_o); },
             [&] { differentiate_queries<T, D>(memory, items, a); });
}

void attention_backward(const AttentionBackward& a, Stream stream) {
  if (a.tokens == 0) return;
  with_attention_shape(a, [&]<class T, int D>(T, std::integral_constant<int, D>) {
    const bool fused = a.longest <= LONGEST_FUSED<D>;
    const Items items = Items::of(a, fused);
    const int blocks = blocks_for(items), most = multiprocessors();
    const CUtensorMap qkv = rows_map<D>(a.qkv, a.tokens, 3 * a.heads, a.stride);
    const CUtensorMap d_o = rows_map<D>(a.d_o, a.tokens, a.heads, (int64_t)a.heads * D);
    const int64_t lanes = a.tokens * a.heads * (D / 8);
    launch(delta_kernel<T, D>, (int)((lanes + 255) / 256 < most * 8 ? (lanes + 255) / 256 : most * 8), 256, 0, stream, a);
    if (fused) {
      launch(attention_keys_kernel<T, D, true>, blocks, ATTENTION_THREADS, sizeof(KeyMemory<D, true>), stream, a, items,
             qkv, d_o);
    } else {
      launch(attention_keys_kernel<T, D, false>, blocks, ATTENTION_THREADS, sizeof(KeyMemory<D, false>), stream, a,
             items, qkv, d_o);
      launch(attention_queries_kernel<T, D>, blocks, ATTENTION_THREADS, sizeof(QueryMemory<D>), stream, a, items, qkv, d_o);
    }
  });
}

}  // namespace bertfast::cuda
