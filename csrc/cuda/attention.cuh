// What attention's passes share: who works on what, which keys are seen, and the steps between memory and products.
//
// A block has three warpgroups: one thread of the first loads, the others are consumers, of 64 rows of a product each.
// Blocks stay, and take items in turn: all queries of a head of a sequence where the keys fit into shared memory, else a
// part of them. A ring of tiles goes on from item to item, so that the next is loaded while one is worked on.
#pragma once
#include "../attention.h"

#include "kernels.h"
#include "philox.cuh"

namespace bertfast::cuda {

constexpr int ATTENTION_THREADS = 384, CONSUMERS = 256;
constexpr int ROWS = 64;    // of a consumer's products, and of a load
constexpr int BLOCK = 128;  // queries, or keys, that both consumers have together
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;
constexpr int ALL_CONSUMERS = 1;             // a named barrier
constexpr size_t MOST_SHARED = 227 << 10;    // bytes of a block
constexpr float LOG2_E = 1.44269504f;

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Part of the work: some places of a head of a sequence, from the first to the end.
struct Item {
  int64_t start;  // the sequence's first token
  int sequence, length, head;
  int first, end;

  DEVICE bool is_empty() const { return first >= end; }
};

// The items by number, the head counting fastest, so that neighbours read neighbouring memory.
struct Items {
  const int64_t* cu_seqlens;
  int sequences, heads;
  int count;
  bool whole;  // an item is all of a sequence; else BLOCK places, or fewer at its end

  static Items of(const AttentionInputs& a, bool whole) {
    // Where sequence s starts, cu_seqlens[s] / BLOCK + s blocks have passed: enough for all before it. Without a
    // sequence there are no items, however many tokens: the bisection would read cu_seqlens behind its end.
    const int64_t blocks = whole || a.sequences == 0 ? a.sequences : a.tokens / BLOCK + a.sequences;
    return {a.cu_seqlens, a.sequences, a.heads, (int)(blocks * a.heads), whole};
  }

  DEVICE Item operator[](int number) const {
    const int block = number / heads, head = number % heads;
    if (whole) {
      const int64_t start = cu_seqlens[block];
      const int length = (int)(cu_seqlens[block + 1] - start);
      return {start, block, length, head, 0, length};
    }
    int low = 0, high = sequences;  // the sequence is in [low, high)
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (cu_seqlens[middle] / BLOCK + middle <= block) low = middle;
      else high = middle;
    }
    const int64_t start = cu_seqlens[low];
    const int length = (int)(cu_seqlens[low + 1] - start);
    const int first = (block - (int)(start / BLOCK) - low) * BLOCK;
    return {start, low, length, head, first, first + BLOCK < length ? first + BLOCK : length};
  }
};

// Which keys are seen from where; the other way round, which queries see a key.
struct Sight {
  int length, window;
  bool causal;

  DEVICE Sight(const AttentionInputs& a, int length) : length(length), window(a.window), causal(a.causal) {}

  DEVICE int first_key(int first_query) const { return first_query > window ? first_query - window : 0; }
  DEVICE int end_key(int end_query) const {
    if (causal) return end_query < length ? end_query : length;
    return length - end_query > window ? end_query + window : length;
  }
  DEVICE int first_query(int first_key) const { return causal ? first_key : this->first_key(first_key); }
  DEVICE int end_query(int end_key) const { return length - end_key > window ? end_key + window : length; }

  // Whether all of the queries see all of the keys.
  DEVICE bool is_whole(int query, int queries, int key, int keys) const {
    if (key + keys > length || query + queries > length) return false;
    if (causal && key + keys - 1 > query) return false;
    return query + queries - 1 - key <= window && key + keys - 1 - query <= window;
  }
  DEVICE bool sees(int query, int key) const {
    const int behind = query - key;
    return key < length && query < length && behind <= window && behind >= (causal ? 0 : -window);
  }
};

// Loads a tile's rows from a token on: `part` of [T, parts, D] in memory.
template <int TILE_ROWS, int D>
DEVICE void load_tile(Tile<TILE_ROWS, D>& tile, const CUtensorMap* map, uint64_t* barrier, int part, int64_t token) {
  using Loaded = Tile<TILE_ROWS, D>;
  UNROLL for (int panel = 0; panel < Loaded::PANELS; ++panel)
    UNROLL for (int row = 0; row < TILE_ROWS; row += ROWS)
      load_box(tile.bytes + panel * Loaded::PANEL_BYTES + row * Loaded::SPAN, map, barrier, panel * Loaded::PANEL, part,
               (int)token + row);
}

// The map for that; a box is ROWS rows of a panel.
template <int D>
CUtensorMap rows_map(const void* data, int64_t tokens, int parts, int64_t stride) {
  using Loaded = Tile<ROWS, D>;
  return tensor_map<3>({data,
                        {(uint64_t)D, (uint64_t)parts, (uint64_t)tokens},
                        {(uint64_t)D * 2, (uint64_t)stride * 2},
                        {(uint32_t)Loaded::PANEL, 1, ROWS},
                        Loaded::swizzle});
}

// Zeroes a tile's rows from `first` on, by all consumers: 0 times what another sequence has there may be no number.
template <int TILE_ROWS, int D>
DEVICE void clear_rows(Tile<TILE_ROWS, D>& tile, int first) {
  constexpr int EACH = D / 8;  // 16 bytes of a row
  for (int i = first * EACH + (int)threadIdx.x - (ATTENTION_THREADS - CONSUMERS); i < TILE_ROWS * EACH; i += CONSUMERS)
    *(Words4*)tile.at(i / EACH, i % EACH * 8) = {};
}

// Writes the rows of a product, of which `rows` are there, each times its factor, to `out` with `stride` elements from
// a row to the next.
template <class T, int R>
DEVICE void store_rows(const float (&d)[R], float factor_above, float factor_below, int rows, T* out, int64_t stride) {
  UNROLL for (int i = 0; i < R; i += 2) {
    const float factor = i / 2 % 2 ? factor_below : factor_above;
    const uint32_t pair = pack(T{}, d[i] * factor, d[i + 1] * factor);
    if (fragment_row(i) < rows) *(uint32_t*)(out + fragment_row(i) * stride + fragment_column(i)) = pair;
  }
}

// Zeroes the places that belong to no sequence, of [T, width].
template <class T>
DEVICE void clear_unused(T* x, int64_t used, int64_t tokens, int64_t width) {
  const int64_t threads = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = used * width + (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < tokens * width; i += threads)
    x[i] = {};
}

// Which probabilities of a sequence and a head are kept; see bertfast/ops/dropout.py. Of 16 x 16 of them a thread holds 8,
// in one call of Philox, and its neighbour in the fourth next row the rest of that call.
class AttentionMask {
 public:
  DEVICE AttentionMask(const AttentionDropout& dropout, int sequence, int head) : threshold_(dropout.threshold) {
    if (threshold_ == 0) return;
    seed_ = *dropout.seed, number_ = (uint32_t)dropout.number[sequence], word_ = dropout.word | (uint32_t)head;
  }

  DEVICE bool drops() const { return threshold_ != 0; }
  DEVICE float scale() const { return scale_of(threshold_); }

  // For two neighbouring 16 x 16 blocks of a product whose rows are queries (keys if TRANSPOSED), the thread's warp from
  // `row` on, columns from `column` on: bit i of the result says whether the thread's i-th of 16 registers is kept.
  template <bool TRANSPOSED>
  DEVICE uint32_t kept(int row, int column) const {
    const uint32_t lane = threadIdx.x % 32, odd = lane / 4 % 2;
    const uint32_t row_group = (uint32_t)row / 4 + lane / 8, column_group = (uint32_t)column / 4 + lane % 4 + 4 * odd;
    const Octets mine = TRANSPOSED ? philox(row_group, column_group, number_, word_, seed_)
                                   : philox(column_group, row_group, number_, word_, seed_);
    // Of each word two bytes are the even row's. Register pairs {0, 1}, {4, 5} are the upper rows', then the lower ones'.
    const uint32_t even_bytes = TRANSPOSED ? 0x6420u : 0x5410u, odd_bytes = TRANSPOSED ? 0x7531u : 0x7632u;
    const uint32_t own = odd ? odd_bytes : even_bytes, other = odd ? even_bytes : odd_bytes;
    const uint32_t upper[2] = {mine.word[0], mine.word[TRANSPOSED ? 2 : 1]};
    const uint32_t lower[2] = {mine.word[TRANSPOSED ? 1 : 2], mine.word[3]};
    uint32_t bytes[2][2];  // block, half of the rows
    const uint32_t kept_upper = __byte_perm(upper[0], upper[1], own), kept_lower = __byte_perm(lower[0], lower[1], own);
    const uint32_t got_upper = __shfl_xor_sync(~0u, __byte_perm(upper[0], upper[1], other), 4);
    const uint32_t got_lower = __shfl_xor_sync(~0u, __byte_perm(lower[0], lower[1], other), 4);
    bytes[0][0] = odd ? got_upper : kept_upper, bytes[0][1] = odd ? got_lower : kept_lower;
    bytes[1][0] = odd ? kept_upper : got_upper, bytes[1][1] = odd ? kept_lower : got_lower;
    uint32_t result = 0;
    UNROLL for (int i = 0; i < 16; ++i) {
      const int byte = i % 2 + i / 4 % 2 * 2;
      const uint32_t drawn = bytes[i / 8][i / 2 % 2] >> byte * 8 & 0xff;
      result |= (drawn >= (uint32_t)threshold_ ? 1u : 0u) << i;
    }
    return result;
  }

 private:
  int threshold_;
  uint64_t seed_;
  uint32_t number_, word_;
};

// The first row of the calling warp, of its warpgroup's 64.
DEVICE int warp_row() { return (int)threadIdx.x % 128 / 32 * 16; }

// The consumer that the calling thread belongs to, in a register that the compiler knows to be the same in a warp.
DEVICE int consumer_number() { return __shfl_sync(~0u, (int)threadIdx.x / 128 - 1, 0); }

// One thread loads, and two warpgroups compute.
template <class Load, class Compute>
DEVICE void share_work(const Load& load, const Compute& compute) {
  __syncthreads();  // the barriers are there
  if (threadIdx.x < ATTENTION_THREADS - CONSUMERS) {
    give_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x < 32 && elected()) load();
  } else {
    take_registers<CONSUMER_REGISTERS>();
    compute();
  }
}

// As many blocks as stay on the GPU, or fewer if there are not so many items.
inline int blocks_for(const Items& items) {
  const int most = multiprocessors();
  return items.count < 1 ? 1 : items.count < most ? items.count : most;
}

// f(T{}, constant D) for the types and head dimensions that there are kernels of.
template <class F>
void with_attention_shape(const AttentionInputs& a, const F& f) {
  const auto with_dimension = [&]<class T>(T type) {
    switch (a.head_dimension) {
      case 32: return f(type, std::integral_constant<int, 32>{});
      case 64: return f(type, std::integral_constant<int, 64>{});
      default: return f(type, std::integral_constant<int, 128>{});
    }
  };
  if (a.type == Type::bfloat16) with_dimension(BFloat16{});
  else with_dimension(Half{});
}

}  // namespace bertfast::cuda
