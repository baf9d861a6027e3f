#include "attention.cuh"

namespace bertfast::cuda {

// Tiles of keys and values. Where all of a sequence's fit, they are loaded once for all of its queries.
template <int D>
constexpr int FORWARD_STAGES = D == 32 ? 8 : D == 64 ? 6 : 2;
template <int D>
constexpr int LONGEST_WHOLE = FORWARD_STAGES<D> * BLOCK < 512 ? FORWARD_STAGES<D> * BLOCK : 512;

template <int D>
struct ForwardMemory {
  static constexpr int STAGES = FORWARD_STAGES<D>;
  Tile<BLOCK, D> k[STAGES], v[STAGES];
  Tile<ROWS, D> q[2][2];  // two for each consumer
  uint64_t full[STAGES], empty[STAGES], q_full[2][2], q_empty[2][2];
};

// The tiles of keys that some of an item's queries see, and in how many rounds the consumers go through its queries.
struct ForwardPlan {
  int first_tile, end_tile, rounds;

  DEVICE ForwardPlan(const Item& item, const Sight& sight)
      : first_tile(sight.first_key(item.first) / BLOCK),
        end_tile(ceil_div(sight.end_key(item.end), BLOCK)),
        rounds(ceil_div(item.end - item.first, BLOCK)) {}
};

template <int D>
DEVICE void load_items(ForwardMemory<D>& memory, const Items& items, const AttentionForward& a, const CUtensorMap* map) {
  using Memory = ForwardMemory<D>;
  int tiles = 0, rounds = 0;  // loaded so far
  for (int number = (int)blockIdx.x; number < items.count; number += (int)gridDim.x) {
    const Item item = items[number];
    if (item.is_empty()) continue;
    const ForwardPlan plan(item, Sight(a, item.length));
    const auto load_queries = [&](int round) {
      for (int consumer = 0; consumer < 2; ++consumer) {
        const int slot = rounds % 2;
        wait(&memory.q_empty[consumer][slot], (rounds / 2 + 1) % 2);
        arrive_expecting(&memory.q_full[consumer][slot], Tile<ROWS, D>::BYTES);
        load_tile(memory.q[consumer][slot], map, &memory.q_full[consumer][slot], item.head,
                  item.start + item.first + (2 * round + consumer) * ROWS);
      }
      ++rounds;
    };
    load_queries(0);
    for (int tile = plan.first_tile; tile < plan.end_tile; ++tile, ++tiles) {
      const int stage = tiles % Memory::STAGES;
      wait(&memory.empty[stage], (tiles / Memory::STAGES + 1) % 2);
      arrive_expecting(&memory.full[stage], 2 * Tile<BLOCK, D>::BYTES);
      const int64_t token = item.start + (int64_t)tile * BLOCK;
      load_tile(memory.k[stage], map, &memory.full[stage], a.heads + item.head, token);
      load_tile(memory.v[stage], map, &memory.full[stage], 2 * a.heads + item.head, token);
    }
    for (int round = 1; round < plan.rounds; ++round) load_queries(round);
  }
}

// What is known of a thread's two rows of queries so far: online softmax (Milakov and Gimelshein, 2018).
struct Rows2 {
  float most[2] = {-INFINITY, -INFINITY}, total[2] = {};
};

// Scores become probabilities relative to the largest score so far; what was summed up before is made so too.
template <int R>
DEVICE void soften(float (&scores)[BLOCK / 2], float scale, Rows2& rows, float (&sums)[R]) {
  UNROLL for (int h = 0; h < 2; ++h) {
    float most = rows.most[h];
    UNROLL for (int i = 0; i < BLOCK / 2; ++i)
      if (i / 2 % 2 == h) most = fmaxf(most, scores[i]);
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
    const float reference = most == -INFINITY ? 0.f : most;  // nothing seen yet: -inf - -inf is no number
    const float shrink = fast_exp2((rows.most[h] - reference) * scale), offset = reference * scale;
    rows.most[h] = most, rows.total[h] *= shrink;
    UNROLL for (int i = 0; i < BLOCK / 2; ++i)
      if (i / 2 % 2 == h) {
        scores[i] = fast_exp2(scores[i] * scale - offset);
        rows.total[h] += scores[i];
      }
    UNROLL for (int i = 0; i < R; ++i)
      if (i / 2 % 2 == h) sums[i] *= shrink;
  }
}

template <class T, int D>
DEVICE void attend_items(ForwardMemory<D>& memory, const Items& items, const AttentionForward& a) {
  using Memory = ForwardMemory<D>;
  const int consumer = consumer_number();
  const float scale = a.scale * LOG2_E;
  int tiles = 0, rounds = 0;  // used so far
  for (int number = (int)blockIdx.x; number < items.count; number += (int)gridDim.x) {
    const Item item = items[number];
    if (item.is_empty()) continue;
    const Sight sight(a, item.length);
    const ForwardPlan plan(item, sight);
    const AttentionMask mask(a.dropout, item.sequence, item.head);
    for (int round = 0; round < plan.rounds; ++round, ++rounds) {
      const int slot = rounds % 2, query = item.first + (2 * round + consumer) * ROWS;
      const int queries = item.end - query;  // there may be more than ROWS, or none
      Rows2 rows;
      float sums[D / 2] = {};
      wait(&memory.q_full[consumer][slot], rounds / 2 % 2);
      for (int tile = plan.first_tile; tile < plan.end_tile; ++tile) {
        const int use = tiles + tile - plan.first_tile, stage = use % Memory::STAGES, key = tile * BLOCK;
        wait(&memory.full[stage], use / Memory::STAGES % 2);
        if (round == 0 && key + BLOCK > item.length) {
          clear_rows(memory.v[stage], item.length - key);
          fence_proxy();
          meet(ALL_CONSUMERS, CONSUMERS);
        }
        if (queries > 0 && key < sight.end_key(query + ROWS) && key + BLOCK > sight.first_key(query)) {
          float scores[BLOCK / 2];
          fence_products(scores);
          UNROLL for (int depth = 0; depth < D; depth += 16)
            multiply<Major::k, Major::k>(T{}, scores, memory.q[consumer][slot].template slice<Major::k>(depth),
                                         memory.k[stage].template slice<Major::k>(depth), depth > 0);
          commit_products();
          wait_products<0>(scores);
          if (!sight.is_whole(query, ROWS, key, BLOCK))
            UNROLL for (int i = 0; i < BLOCK / 2; ++i)
              if (!sight.sees(query + fragment_row(i), key + fragment_column(i))) scores[i] = -INFINITY;
          soften(scores, scale, rows, sums);
          if (mask.drops())
            UNROLL for (int column = 0; column < BLOCK; column += 32) {
              const uint32_t kept = mask.kept<false>(query + warp_row(), key + column);
              UNROLL for (int i = 0; i < 16; ++i)
                if (!(kept >> i & 1)) scores[column / 2 + i] = 0;
            }
          uint32_t p[BLOCK / 16][4];
          UNROLL for (int i = 0; i < BLOCK / 4; ++i) p[i / 4][i % 4] = pack(T{}, scores[2 * i], scores[2 * i + 1]);
          fence_products(sums);
          UNROLL for (int depth = 0; depth < BLOCK; depth += 16)
            multiply<Major::mn>(T{}, sums, p[depth / 16], memory.v[stage].template slice<Major::mn>(depth), true);
          commit_products();
          wait_products<0>(sums);
        }
        if (round + 1 == plan.rounds && threadIdx.x % 32 == 0) arrive(&memory.empty[stage]);
      }
      if (threadIdx.x % 32 == 0) arrive(&memory.q_empty[consumer][slot]);
      if (queries <= 0) continue;
      const int64_t token = item.start + query;
      UNROLL for (int h = 0; h < 2; ++h) {
        rows.total[h] += __shfl_xor_sync(~0u, rows.total[h], 1);
        rows.total[h] += __shfl_xor_sync(~0u, rows.total[h], 2);
        const int row = fragment_row(2 * h);
        if (row < queries && threadIdx.x % 4 == 0)
          a.lse[item.head * a.tokens + token + row] =
              rows.most[h] * scale + log2f(rows.total[h] / (float)item.length);
      }
      const float kept = mask.drops() ? mask.scale() : 1.f;
      store_rows(sums, kept / rows.total[0], kept / rows.total[1], queries,
                 (T*)a.o + (token * a.heads + item.head) * D, (int64_t)a.heads * D);
    }
    tiles += plan.end_tile - plan.first_tile;
  }
}

template <class T, int D>
__global__ void __launch_bounds__(ATTENTION_THREADS, 1)
    attention_forward_kernel(const AttentionForward a, const Items items, const __grid_constant__ CUtensorMap qkv) {
  using Memory = ForwardMemory<D>;
  static_assert(sizeof(Memory) <= MOST_SHARED);
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
  clear_unused((T*)a.o, a.cu_seqlens[a.sequences], a.tokens, (int64_t)a.heads * D);
  share_work([&] { load_items<D>(memory, items, a, &qkv); }, [&] { attend_items<T, D>(memory, items, a); });
}

void attention_forward(const AttentionForward& a, Stream stream) {
  if (a.tokens == 0) return;
  with_attention_shape(a, [&]<class T, int D>(T, std::integral_constant<int, D>) {
    const Items items = Items::of(a, a.longest <= LONGEST_WHOLE<D>);
    launch(attention_forward_kernel<T, D>, blocks_for(items), ATTENTION_THREADS, sizeof(ForwardMemory<D>), stream,
           a, items, rows_map<D>(a.qkv, a.tokens, 3 * a.heads, a.stride));
  });
}

}  // namespace bertfast::cuda
