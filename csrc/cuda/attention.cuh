// Shared by attention's forward and backward pass: tile scheduler, attention mask, dropout mask, loads and stores.
//
// A block has three warpgroups: one thread of the first is the producer, the other two are consumers of 64 rows of a
// wgmma each. Blocks are persistent and iterate over work tiles: all queries of one head of a sequence if its keys fit
// into shared memory, else BLOCK of them. The ring buffer of K/V tiles continues across work tiles, so that the next
// work tile is loaded while one is computed.
#pragma once
#include "../attention.h"

#include "kernels.h"
#include "philox.cuh"

namespace bertfast::cuda {

constexpr int ATTENTION_THREADS = 384, CONSUMERS = 256;
constexpr int ROWS = 64;    // rows of a consumer's wgmma, and of a TMA box
constexpr int BLOCK = 128;  // queries, or keys, of both consumers together
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;
constexpr int ALL_CONSUMERS = 1;                // a named barrier
constexpr size_t MAX_SHARED_BYTES = 227 << 10;  // per block
constexpr float LOG2_E = 1.44269504f;

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// One head of a sequence, tokens first … end - 1: queries, or keys in the backward pass over keys.
struct WorkTile {
  int64_t start;  // the sequence's first token
  int sequence, length, head;
  int first, end;

  DEVICE bool is_empty() const { return first >= end; }
};

// Enumerates the work tiles. The head varies fastest, so that neighbouring blocks read neighbouring memory.
struct TileScheduler {
  const int64_t* cu_seqlens;
  int sequences, heads;
  int count;
  bool whole;  // a work tile is a whole sequence; else at most BLOCK tokens of it

  static TileScheduler of(const AttentionInputs& a, bool whole) {
    // Sequence s owns the blocks from cu_seqlens[s] / BLOCK + s on, which leaves enough for all sequences before it.
    // Without sequences there are no work tiles, even with padding slots: the bisection would read past cu_seqlens.
    const int64_t blocks = whole || a.sequences == 0 ? a.sequences : a.capacity / BLOCK + a.sequences;
    return {a.cu_seqlens, a.sequences, a.heads, (int)(blocks * a.heads), whole};
  }

  DEVICE WorkTile operator[](int index) const {
    const int block = index / heads, head = index % heads;
    if (whole) {
      const int64_t start = cu_seqlens[block];
      const int length = (int)(cu_seqlens[block + 1] - start);
      return {start, block, length, head, 0, length};
    }
    int low = 0, high = sequences;  // bisection: the sequence is in [low, high)
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

// Causal and sliding-window mask: the range of keys for a range of queries, and the reverse.
struct AttentionMask {
  int length, window;
  bool causal;

  DEVICE AttentionMask(const AttentionInputs& a, int length) : length(length), window(a.window), causal(a.causal) {}

  DEVICE int kv_begin(int q_begin) const { return q_begin > window ? q_begin - window : 0; }
  DEVICE int kv_end(int q_end) const {
    if (causal) return q_end < length ? q_end : length;
    return length - q_end > window ? q_end + window : length;
  }
  DEVICE int q_begin(int kv_begin) const { return causal ? kv_begin : this->kv_begin(kv_begin); }
  DEVICE int q_end(int kv_end) const { return length - kv_end > window ? kv_end + window : length; }

  // Whether no score of the block is masked.
  DEVICE bool is_full_block(int query, int queries, int key, int keys) const {
    if (key + keys > length || query + queries > length) return false;
    if (causal && key + keys - 1 > query) return false;
    return query + queries - 1 - key <= window && key + keys - 1 - query <= window;
  }
  DEVICE bool attends(int query, int key) const {
    const int behind = query - key;
    return key < length && query < length && behind <= window && behind >= (causal ? 0 : -window);
  }
};

// Load a tile's rows from `token` on, of plane `part` of [T, parts, D].
template <int TILE_ROWS, int D>
DEVICE void load_tile(Tile<TILE_ROWS, D>& tile, const CUtensorMap* map, uint64_t* barrier, int part, int64_t token) {
  using Loaded = Tile<TILE_ROWS, D>;
  UNROLL_FOR (int panel = 0; panel < Loaded::PANELS; ++panel)
    UNROLL_FOR (int row = 0; row < TILE_ROWS; row += ROWS)
      load_box(tile.bytes + panel * Loaded::PANEL_BYTES + row * Loaded::SPAN, map, barrier, panel * Loaded::PANEL, part,
               (int)token + row);
}

// The tensor map for load_tile; a box is ROWS rows of a panel.
template <int D>
CUtensorMap rows_map(const void* data, int64_t tokens, int parts, int64_t stride) {
  using Loaded = Tile<ROWS, D>;
  return tensor_map<3>({data,
                        {(uint64_t)D, (uint64_t)parts, (uint64_t)tokens},
                        {(uint64_t)D * 2, (uint64_t)stride * 2},
                        {(uint32_t)Loaded::PANEL, 1, ROWS},
                        Loaded::swizzle});
}

// Zero a tile's rows from `first` on, by all consumers: a box reaches into the next sequence, where 0 · value may be
// NaN.
template <int TILE_ROWS, int D>
DEVICE void zero_rows(Tile<TILE_ROWS, D>& tile, int first) {
  constexpr int EACH = D / 8;  // 16 bytes of a row
  for (int i = first * EACH + (int)threadIdx.x - (ATTENTION_THREADS - CONSUMERS); i < TILE_ROWS * EACH; i += CONSUMERS)
    *(Words4*)tile.at(i / EACH, i % EACH * 8) = {};
}

// Write the first `rows` rows of an accumulator, each times its factor, to `out`, rows `stride` elements apart.
// factor_above is for the upper row of a thread's two, factor_below for the lower.
template <class T, int R>
DEVICE void store_rows(const float (&d)[R], float factor_above, float factor_below, int rows, T* out, int64_t stride) {
  UNROLL_FOR (int i = 0; i < R; i += 2) {
    const float factor = i / 2 % 2 ? factor_below : factor_above;
    const uint32_t pair = pack(T{}, d[i] * factor, d[i + 1] * factor);
    if (fragment_row(i) < rows) *(uint32_t*)(out + fragment_row(i) * stride + fragment_column(i)) = pair;
  }
}

// Zero the padding slots of x [T, width].
template <class T>
DEVICE void zero_padding_slots(T* x, int64_t num_tokens, int64_t tokens, int64_t width) {
  const int64_t threads = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = num_tokens * width + (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < tokens * width;
       i += threads)
    x[i] = {};
}

// Dropout mask of one head of a sequence; see bertfast/ops/dropout.py. Of a 16 x 16 block a thread holds 8 elements,
// whose random bytes are half of one Philox call; the lane four further holds the other half.
class AttentionDropoutMask {
 public:
  DEVICE AttentionDropoutMask(const AttentionDropout& dropout, int sequence, int head) : threshold_(dropout.threshold) {
    if (threshold_ == 0) return;
    seed_ = *dropout.seed, sequence_id_ = (uint32_t)dropout.sequence_ids[sequence];
    counter_word_ = dropout.counter_word | (uint32_t)head;
  }

  DEVICE bool drops() const { return threshold_ != 0; }
  DEVICE float scale() const { return scale_of(threshold_); }

  // The mask of two adjacent 16 x 16 blocks of scores, whose rows are queries (keys if TRANSPOSED): the warp's rows
  // start at `row`, the columns at `column`. Bit i says whether the i-th of the thread's 16 registers is kept.
  template <bool TRANSPOSED>
  DEVICE uint32_t kept(int row, int column) const {
    const uint32_t lane = threadIdx.x % 32, odd = lane / 4 % 2;
    const uint32_t row_group = (uint32_t)row / 4 + lane / 8, column_group = (uint32_t)column / 4 + lane % 4 + 4 * odd;
    const PhiloxWords drawn_words = TRANSPOSED ? philox(row_group, column_group, sequence_id_, counter_word_, seed_)
                                               : philox(column_group, row_group, sequence_id_, counter_word_, seed_);
    // Two bytes of each word belong to the even row, two to the odd one. Each thread draws one block and exchanges the
    // other row's bytes. Register pairs {0, 1} and {4, 5} belong to the upper rows, {2, 3} and {6, 7} to the lower.
    const uint32_t even_bytes = TRANSPOSED ? 0x6420u : 0x5410u, odd_bytes = TRANSPOSED ? 0x7531u : 0x7632u;
    const uint32_t own_bytes = odd ? odd_bytes : even_bytes, partner_bytes = odd ? even_bytes : odd_bytes;
    const uint32_t upper[2] = {drawn_words.word[0], drawn_words.word[TRANSPOSED ? 2 : 1]};
    const uint32_t lower[2] = {drawn_words.word[TRANSPOSED ? 1 : 2], drawn_words.word[3]};
    uint32_t bytes[2][2];  // [block][upper or lower row]
    const uint32_t kept_upper = __byte_perm(upper[0], upper[1], own_bytes);
    const uint32_t kept_lower = __byte_perm(lower[0], lower[1], own_bytes);
    const uint32_t received_upper = __shfl_xor_sync(~0u, __byte_perm(upper[0], upper[1], partner_bytes), 4);
    const uint32_t received_lower = __shfl_xor_sync(~0u, __byte_perm(lower[0], lower[1], partner_bytes), 4);
    bytes[0][0] = odd ? received_upper : kept_upper, bytes[0][1] = odd ? received_lower : kept_lower;
    bytes[1][0] = odd ? kept_upper : received_upper, bytes[1][1] = odd ? kept_lower : received_lower;
    uint32_t result = 0;
    UNROLL_FOR (int i = 0; i < 16; ++i) {
      const int byte = i % 2 + i / 4 % 2 * 2;
      const uint32_t byte_value = bytes[i / 8][i / 2 % 2] >> byte * 8 & 0xff;
      result |= (byte_value >= (uint32_t)threshold_ ? 1u : 0u) << i;
    }
    return result;
  }

 private:
  int threshold_;
  uint64_t seed_;
  uint32_t sequence_id_, counter_word_;
};

// The first of the calling warp's 16 rows within its warpgroup's 64.
DEVICE int warp_row() { return (int)threadIdx.x % 128 / 32 * 16; }

// The calling thread's consumer, by a shuffle, so that the compiler knows it is uniform in a warp.
DEVICE int consumer_index() { return __shfl_sync(~0u, (int)threadIdx.x / 128 - 1, 0); }

// Warp specialisation: one thread runs `load`, two warpgroups run `compute`.
template <class Load, class Compute>
DEVICE void specialize_warps(const Load& load, const Compute& compute) {
  __syncthreads();  // the mbarriers are initialised
  if (threadIdx.x < ATTENTION_THREADS - CONSUMERS) {
    setmaxnreg_dec<PRODUCER_REGISTERS>();
    if (threadIdx.x < 32 && elect_one()) load();
  } else {
    setmaxnreg_inc<CONSUMER_REGISTERS>();
    compute();
  }
}

// One persistent block per SM, or fewer if there are fewer work tiles.
inline int persistent_blocks(const TileScheduler& scheduler) {
  const int sms = sm_count();
  return scheduler.count < 1 ? 1 : scheduler.count < sms ? scheduler.count : sms;
}

// Call f(T{}, integral_constant D) with the element type and head dimension.
template <class F>
void with_attention_shape(const AttentionInputs& a, const F& f) {
  const auto with_dimension = [&]<class T>(T type) {
    switch (a.head_dim) {
      case 32: return f(type, std::integral_constant<int, 32>{});
      case 64: return f(type, std::integral_constant<int, 64>{});
      default: return f(type, std::integral_constant<int, 128>{});
    }
  };
  if (a.type == Type::bfloat16) with_dimension(BFloat16{});
  else with_dimension(Half{});
}

}  // namespace bertfast::cuda
