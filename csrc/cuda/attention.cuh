// Shared by attention's forward and backward pass: attention mask, dropout mask, loads and stores.
//
// A block has three warpgroups: one thread of the first is the producer, and in the backward pass over keys two other
// warps of it write the statistics of each step's queries; the second and third warpgroup are consumers of 64 rows of a
// wgmma each. Blocks are persistent and iterate over work tiles: all queries of one head of a sequence if its keys fit
// into shared memory, else BLOCK of them. The ring buffer of K/V tiles continues across work tiles, so that the next
// work tile is loaded while one is computed.
#pragma once
#include "kernels.h"
#include "philox.cuh"
#include "work_tiles.cuh"

namespace bertfast::cuda {

constexpr int ROWS = 64;        // rows of a consumer's wgmma, and of a TMA box
constexpr int REGISTERS = 504;  // of a thread of each warpgroup together
constexpr int ASSISTING_WARPS = 2;
constexpr int ALL_CONSUMERS = 1;                // a named barrier
constexpr size_t MAX_SHARED_BYTES = 227 << 10;  // per block
constexpr float LOG2_E = 1.44269504f;

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

  // Whether causality or the window masks a score of the block; the sequence's end aside.
  DEVICE bool limits(int query, int queries, int key, int keys) const {
    const int first = query - (key + keys - 1), last = query + queries - 1 - key;  // of all differences query - key
    return first < lowest() || last > window;
  }
  // Whether causality and the window let a query attend to a key. As unsigned numbers, one comparison does for both.
  DEVICE bool reaches(int query, int key) const {
    return (uint32_t)(query - key - lowest()) <= (uint32_t)window - (uint32_t)lowest();
  }

 private:
  DEVICE int lowest() const { return causal ? 0 : -window; }  // of query - key
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

// Set the columns of a fragment from `end` on, such as those of keys beyond the sequence's end.
template <int R>
DEVICE void fill_columns(float (&d)[R], int end, float value) {
  end -= fragment_column(0);
  UNROLL_FOR (int i = 0; i < R; ++i)
    if (i / 4 * 8 + i % 2 >= end) d[i] = value;
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

// Which of a thread's 16 elements of two adjacent 16 x 16 blocks are kept: the highest bits of the bytes of
// word[block][upper or lower row].
struct KeptElements {
  static constexpr uint32_t ALL = ~0u;  // in one register
  uint32_t word[2][2];

  // All elements in one register, in the order of bit().
  DEVICE uint32_t in_one_register() const {
    uint32_t result = 0;
    UNROLL_FOR (int i = 0; i < 4; ++i) result |= (word[i / 2][i % 2] & 0x80808080u) >> i;
    return result;
  }
  DEVICE static constexpr int bit(int i) { return i / 4 % 2 * 16 + i % 2 * 8 + 7 - (i / 8 * 2 + i / 2 % 2); }
  // The mask of elements 2 i and 2 i + 1 as 16-bit values.
  DEVICE uint32_t pair(int i) const { return sign_masks(word[i / 4][i % 2], i / 2 % 2 * 2); }
};

// Dropout masks, of one head of a sequence at a time; see bertfast/ops/dropout.py. Of a 16 x 16 block a thread holds 8
// elements, whose random bytes are half of one Philox call; the lane four further holds the other half.
// Unless it would spill, KEEP_KEYS holds the keys of all rounds in 20 registers, which saves 18 instructions per call.
template <bool KEEP_KEYS>
class AttentionDropoutMask {
 public:
  DEVICE explicit AttentionDropoutMask(const AttentionDropout& dropout)
      : threshold_(dropout.threshold), counter_word_(dropout.counter_word) {
    if (threshold_ == 0) return;
    seed_[0] = (uint32_t)*dropout.seed, seed_[1] = (uint32_t)(*dropout.seed >> 32);
    if constexpr (KEEP_KEYS) {
      keys_ = PhiloxKeys(seed_);
      keep_in_registers(keys_.key[0]), keep_in_registers(keys_.key[1]);
    }
    addend_ = (0x80u - (uint32_t)threshold_ % 0x80u) * 0x01010101u, either_ = threshold_ < 0x80 ? ~0u : 0u;
  }

  // Draw the masks of a work tile from now on.
  DEVICE void select(const WorkTile& work) { sequence_id_ = work.sequence_id, head_ = (uint32_t)work.head; }

  DEVICE bool drops() const { return threshold_ != 0; }
  DEVICE float scale() const { return fast_reciprocal(keep_probability(threshold_)); }

  // The mask of two adjacent 16 x 16 blocks of scores, whose rows are queries (keys if TRANSPOSED): the warp's rows
  // start at `row`, the columns at `column`.
  template <bool TRANSPOSED>
  DEVICE KeptElements kept(int row, int column) const {
    const uint32_t lane = threadIdx.x % 32, odd = lane / 4 % 2;
    const uint32_t row_group = (uint32_t)row / 4 + lane / 8, column_group = (uint32_t)column / 4 + lane % 4 + 4 * odd;
    uint32_t seed[2] = {seed_[0], seed_[1]};
    if constexpr (!KEEP_KEYS) keep_in_registers(seed);  // so that the compiler does not move the keys out of loops
    const PhiloxKeys keys = KEEP_KEYS ? keys_ : PhiloxKeys(seed);
    PhiloxWords drawn = TRANSPOSED ? philox(row_group, column_group, sequence_id_, counter_word_ | head_, keys)
                                   : philox(column_group, row_group, sequence_id_, counter_word_ | head_, keys);
    UNROLL_FOR (int i = 0; i < 4; ++i) drawn.word[i] = compare_bytes(drawn.word[i]);
    // Two bytes of each word belong to the even row, two to the odd one. Each thread draws one block and exchanges the
    // other row's bytes. Register pairs {0, 1} and {4, 5} belong to the upper rows, {2, 3} and {6, 7} to the lower.
    const uint32_t even_bytes = TRANSPOSED ? 0x6420u : 0x5410u, odd_bytes = TRANSPOSED ? 0x7531u : 0x7632u;
    const uint32_t own_bytes = odd ? odd_bytes : even_bytes, partner_bytes = odd ? even_bytes : odd_bytes;
    const uint32_t upper[2] = {drawn.word[0], drawn.word[TRANSPOSED ? 2 : 1]};
    const uint32_t lower[2] = {drawn.word[TRANSPOSED ? 1 : 2], drawn.word[3]};
    const uint32_t own_upper = __byte_perm(upper[0], upper[1], own_bytes);
    const uint32_t own_lower = __byte_perm(lower[0], lower[1], own_bytes);
    const uint32_t received_upper = __shfl_xor_sync(~0u, __byte_perm(upper[0], upper[1], partner_bytes), 4);
    const uint32_t received_lower = __shfl_xor_sync(~0u, __byte_perm(lower[0], lower[1], partner_bytes), 4);
    return {{{odd ? received_upper : own_upper, odd ? received_lower : own_lower},
             {odd ? own_upper : received_upper, odd ? own_lower : received_lower}}};
  }

 private:
  // Set the highest bit of each byte to whether the byte is at least the threshold: it is if its lower seven bits are
  // at least threshold % 128, which their sum with 128 - threshold % 128 shows, or (and, from 128 on) if its highest
  // is.
  DEVICE uint32_t compare_bytes(uint32_t bytes) const {
    const uint32_t sum = (bytes & 0x7f7f7f7fu) + addend_;
    return (sum & bytes) | ((sum | bytes) & either_);
  }

  int threshold_;
  uint32_t counter_word_, seed_[2];
  PhiloxKeys keys_;
  uint32_t sequence_id_, head_;
  uint32_t addend_, either_;  // 128 - threshold % 128 in each byte; all ones for a threshold below 128, else 0
};

// The first of the calling warp's 16 rows within its warpgroup's 64.
DEVICE int warp_row() { return (int)threadIdx.x % 128 / 32 * 16; }

// The calling thread's consumer.
DEVICE int consumer_index() { return uniform((int)threadIdx.x / 128 - 1); }

// Warp specialisation: one thread runs `load`, two warpgroups run `compute`, and ASSISTING_WARPS of the first
// warpgroup run `assist`.
template <int PRODUCER_REGISTERS = 24, class Load, class Compute, class Assist>
DEVICE void specialize_warps(const Load& load, const Compute& compute, const Assist& assist) {
  __syncthreads();  // the mbarriers are initialised
  const int warp = uniform((int)threadIdx.x / 32);
  if (warp < (ATTENTION_THREADS - CONSUMERS) / 32) {
    setmaxnreg_dec<PRODUCER_REGISTERS>();
    if (warp > 0 && warp <= ASSISTING_WARPS) assist();
    else if (warp == 0 && elect_one()) load();
  } else {
    setmaxnreg_inc<(REGISTERS - PRODUCER_REGISTERS) / 2>();
    compute();
  }
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
