#include "../packed_linear.h"

#include <type_traits>

#include "gelu.h"
#include "quads.h"
#include "rows.h"
#include "shrinking_scratch.h"
#include "tiles.h"

namespace bertfast::BERTFAST_SET {

// A tile of y has up to STRIP rows and two registers of columns: as many accumulators as there are registers for. With
// AMX it has two tile registers of rows, so that each of the weight's is multiplied twice.
template <class F>
constexpr int STRIP = IS_TILED<F>       ? 2 * TILE_ROWS
                      : REGISTERS == 32 ? 12
                                        : 6;
constexpr int TILE = 2 * LANES;
// Operands of a partial sum: shorter sums round less. With AMX, those of a panel are 24 KiB, half of the L1 cache,
// where they stay while tokens pass: from the L2 cache, tokens and weights together would come no faster than they are
// used.
template <class F>
constexpr int64_t CHUNK = IS_TILED<F> ? 192 : 384;
// A tile register has 16 tokens, and takes as long with fewer. By arithmetic AMX is faster from 3 tokens on, but up to
// about 16 reading the weight, from the L3 cache or from memory, takes longer than VNNI's arithmetic.
constexpr int64_t MAX_TOKENS_WITHOUT_TILES = 16;
constexpr int64_t AHEAD = 24;               // operands by which the weight is fetched ahead
constexpr int64_t BLOCK_BYTES = 400 << 10;  // of packed tokens, which stay in the L2 cache while panels pass
constexpr int64_t SUM_BYTES = 256 << 10;    // of partial sums, which stay there too

INLINE Floats load_operands(const float* p) { return load(p); }
INLINE Words load_operands(const uint32_t* p) { return load(p); }
INLINE Floats multiply_add(Floats sum, float factor, Floats b) { return sum + splat(factor) * b; }
INLINE Floats multiply_add(Floats sum, uint32_t factor, Words b) { return dot_pairs(sum, splat(factor), b); }

template <class F>
using Accumulator = std::conditional_t<IS_QUAD<F>, Ints, Floats>;

// Columns c [ROWS, TILE] of a panel from a [depth, STRIP] and b [depth, PANEL]; added to c unless `first`.
template <int ROWS, class F>
[[gnu::noinline]] static void multiply_tile(const F* a, const F* b, int64_t depth, float* c, bool first) {
  Accumulator<F> sums[ROWS][2] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const auto left = load_operands(b + k * PANEL), right = load_operands(b + k * PANEL + LANES);
    // With few rows the time is that of reading the weight, which the hardware alone does not fetch early enough.
    __builtin_prefetch(b + (k + AHEAD) * PANEL);
    if constexpr (TILE * sizeof(F) > 64) __builtin_prefetch(b + (k + AHEAD) * PANEL + LANES);
    UNROLL_FOR (int i = 0; i < ROWS; ++i) {
      sums[i][0] = multiply_add(sums[i][0], a[k * STRIP<F> + i], left);
      sums[i][1] = multiply_add(sums[i][1], a[k * STRIP<F> + i], right);
    }
  }
  UNROLL_FOR (int i = 0; i < ROWS; ++i)
    UNROLL_FOR (int j = 0; j < 2; ++j) {
      Accumulator<F> sum = sums[i][j], old;
      float* const element = c + i * PANEL + j * LANES;
      std::memcpy(&old, element, sizeof old);
      if (!first) sum += old;
      std::memcpy(element, &sum, sizeof sum);
    }
}

template <int ROWS, class F>
INLINE void multiply_strip(int rows, const F* a, const F* b, int64_t depth, float* c, bool first) {
  if constexpr (IS_TILED<F>) {
    rows > TILE_ROWS ? multiply_in_tiles<2>(a, b, depth, c, first) : multiply_in_tiles<1>(a, b, depth, c, first);
  } else if constexpr (ROWS > 0) {
    if (rows < ROWS) return multiply_strip<ROWS - 1>(rows, a, b, depth, c, first);
    for (int column = 0; column < PANEL; column += TILE) multiply_tile<ROWS>(a, b + column, depth, c + column, first);
  }
}

// Tokens in strips of equal height, a multiple of `unit`: a tile of few rows would not be faster than one of many.
struct Strips {
  int64_t tokens, height, count;
  Strips(int64_t tokens, int64_t most, int64_t unit) : tokens(tokens) {
    const int64_t least = (tokens + most - 1) / most, rows = (tokens + least - 1) / least;
    height = (rows + unit - 1) / unit * unit, count = (tokens + height - 1) / height;
  }
  int rows(int64_t strip) const { return (int)(strip + 1 < count ? height : tokens - strip * height); }
};

// How a token is quantised, with int8.
struct Token {
  float scale;
  int32_t zero;
};

// Convert a row of x to operands of the weight's type, the last one filled with zeros.
template <class T>
static void convert(const T* x, const PackedWeight& w, float* out, Token* /*token*/) {
  for_each_vector(w.depth, [&](int64_t k, int count) { store_columns(out + k, load_columns(x + k, count), count); });
}

template <class T>
static void convert(const T* x, const PackedWeight& w, uint32_t* out, Token* /*token*/) {
  BFloat16* const row = (BFloat16*)out;
  for_each_vector(w.depth, [&](int64_t k, int count) { store_columns(row + k, load_columns(x + k, count), count); });
  if (w.depth % 2) row[w.depth] = {0};
}

// The scale is NaN if a value is not finite, so that the results are NaN.
template <class T>
static void convert(const T* x, const PackedWeight& w, uint8_t* out, Token* token) {
  const auto value = [&](int64_t k, int count) {
    const Floats element = load_columns(x + k, count);
    return w.factors ? element * load_columns(w.factors + k, count) : element;
  };
  Floats above{}, below{}, zeros{};
  for_each_vector(w.depth, [&](int64_t k, int count) {
    const Floats element = value(k, count);
    above = maximum(element, above), below = maximum(-element, below), zeros += element * 0.f;
  });
  const float least = max_lane(below), range = max_lane(above) + least, zero = sum(zeros);
  // 254 steps, not 255: both ends may be rounded up.
  const float inverse = zero == 0 && range > 1e-30f ? 254 / range : 0;  // which does not overflow
  *token = {range / 254 + zero, inverse > 0 ? (int32_t)(least * inverse + 0.5f) : 0};
  for_each_vector(w.depth, [&](int64_t k, int count) {
    // Adding 1.5 · 2^23 rounds to an integer, in the low bits.
    const Words rounded = (Words)(value(k, count) * inverse + 12582912.f) + (uint32_t)token->zero;
    store_bytes(out + k, rounded, count);
  });
  for (int64_t k = w.depth; k % 4; ++k) out[k] = 0;
}

template <class T, class F>
  requires IS_QUAD<F>
INLINE void convert(const T* x, const PackedWeight& w, F* out, Token* token) {
  convert(x, w, (uint8_t*)out, token);
}

// Pack a strip of tokens as tile registers: [depth / 16, STRIP, 16] operands. What is beyond K or `rows` is arbitrary:
// the one is multiplied by zeros, and the sums of the other are not used.
template <class T>
static void pack_strip(const PackedLinear& p, int64_t first, int rows, int64_t depth, Tiled* out, Token* tokens) {
  thread_local Scratch memory;
  Tiled* const operands = memory.reserve<Tiled>(depth);
  for (int i = 0; i < rows; ++i) {
    convert(row<T>(p.x, first + i), p.weight, operands, tokens + i);
    for (int64_t k = 0; k < depth; k += TILE_OPERANDS)
      std::memcpy(out + k * STRIP<Tiled> + i * TILE_OPERANDS, operands + k, TILE_OPERANDS * sizeof(Tiled));
  }
}

// Pack a strip of tokens, transposed: [depth, STRIP] operands.
template <class T, class F>
static void pack_strip(const PackedLinear& p, int64_t first, int rows, int64_t depth, F* out, Token* tokens) {
  thread_local Scratch memory;
  const int64_t width = padded(depth);
  F* const operands = memory.reserve<F>(STRIP<F> * width);
  for (int i = 0; i < rows; ++i) convert(row<T>(p.x, first + i), p.weight, operands + i * width, tokens + i);
  for (int64_t k = 0; k < depth; k += LANES) {
    // Upwards in `k` and downwards in rows: what a register writes beyond STRIP operands, later ones overwrite. The
    // next strip may be another thread's, so that the last ones write no more than the strip.
    for (int top = (STRIP<F> - 1) / LANES * LANES; top >= 0; top -= LANES) {
      Words block[LANES];
      for (int i = 0; i < LANES; ++i)
        block[i] = top + i < rows ? load((const uint32_t*)(operands + (top + i) * width + k)) : Words{};
      transpose(block);
      for (int i = 0; i < LANES && k + i < depth; ++i) {
        const int64_t start = (k + i) * STRIP<F> + top, left = STRIP<F> * depth - start;
        if (left >= LANES) store((uint32_t*)out + start, block[i]);
        else std::memcpy((uint32_t*)out + start, &block[i], left * sizeof(uint32_t));
      }
    }
  }
}

static float element(const Vector& x, int64_t index) {
  if (x.data == nullptr) return 0;
  if (x.type == Type::float32) return ((const float*)x.data)[index];
  const uint32_t bits = (uint32_t)((const BFloat16*)x.data)[index].bits << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// A panel's parameters.
struct Columns {
  // Zero beyond the columns of y, where registers are computed, too, but not stored.
  alignas(64) float bias[PANEL] = {}, scales[PANEL] = {};
  alignas(64) int32_t sums[PANEL] = {};

  Columns(const PackedLinear& p, int64_t first, int count) {
    for (int i = 0; i < count; ++i) bias[i] = element(p.bias, first + i);
    if (p.weight.type != WeightType::int8) return;
    for (int i = 0; i < count; ++i) scales[i] = p.weight.scales[first + i], sums[i] = p.weight.sums[first + i];
  }
};

template <class Sums>
INLINE Floats dequantised(const float* sums, const Columns& columns, int64_t column, Token token) {
  if constexpr (std::is_same_v<Sums, Floats>) return load(sums + column);
  Ints quads, weights;
  std::memcpy(&quads, sums + column, sizeof quads);
  std::memcpy(&weights, columns.sums + column, sizeof weights);
  return __builtin_convertvector(quads - weights * token.zero, Floats) * (load(columns.scales + column) * token.scale);
}

// Write a row of c to y.
template <class Sums, class Y>
static void write(const PackedLinear& p, const float* sums, const Columns& columns, int count, Token token, Y* y) {
  const auto apply = [&](const auto& activation) {
    for (int column = 0; column < count; column += LANES) {
      const Floats x = dequantised<Sums>(sums, columns, column, token) + load(columns.bias + column);
      store_columns(y + column, activation(x), count - column < LANES ? count - column : LANES);
    }
  };
  switch (p.epilogue) {
    case Epilogue::none: return apply([](Floats x) { return x; });
    case Epilogue::gelu: return apply([](Floats x) { return gelu<Y, false>(x).value; });
    case Epilogue::gelu_tanh: return apply([](Floats x) { return gelu<Y, true>(x).value; });
  }
}

// Packed tokens, and how y is divided into blocks.
template <class F>
struct Operands {
  static constexpr int VALUES = IS_QUAD<F> ? 4 : std::is_same_v<F, float> ? 1 : 2;  // per operand
  static constexpr int UNIT = IS_TILED<F> ? TILE_OPERANDS : 1;  // operands of a token are padded to a multiple
  static constexpr int64_t HEIGHT = STRIP<F>;
  Strips strips;
  int64_t depth, width, panels;      // K / VALUES, also padded; N / PANEL; all rounded up
  int64_t block, blocks, group = 1;  // a block of y has up to `block` strips and `group` panels
  F* a;                              // [strips, width, HEIGHT], in tiles if it is tiled
  Token* tokens;                     // [strips, HEIGHT]

  explicit Operands(const PackedLinear& p)
      : strips(p.tokens, HEIGHT, IS_TILED<F> ? TILE_ROWS : 1),
        depth((p.weight.depth + VALUES - 1) / VALUES),
        width((depth + UNIT - 1) / UNIT * UNIT),
        panels((p.weight.columns + PANEL - 1) / PANEL) {
    thread_local ShrinkingScratch packed_memory, token_memory;
    a = packed_memory.reserve<F>(strips.count * HEIGHT * width);
    tokens = token_memory.reserve<Token>(strips.count * HEIGHT);
    // If all tokens fit, a panel's sums are finished before the next panel, whose operands are adjacent. Else a chunk
    // of the tokens stays in cache while several panels pass. Blocks are of equal height, so that threads get as much.
    const bool fits = strips.count * HEIGHT * width * (int64_t)sizeof(F) <= BLOCK_BYTES;
    const int64_t chunk = depth < CHUNK<F> ? depth : CHUNK<F>;
    const int64_t most = fits ? strips.count : 1 + BLOCK_BYTES / (HEIGHT * chunk * (int64_t)sizeof(F));
    blocks = (strips.count + most - 1) / most, block = (strips.count + blocks - 1) / blocks;
    if (!fits && depth > chunk) group = 1 + SUM_BYTES / (block * HEIGHT * PANEL * (int64_t)sizeof(float));
  }
  F* strip(int64_t index) const { return a + index * HEIGHT * width; }
};

// The strips first … last - 1 of y in the panels panel … end - 1.
template <class F>
static void multiply_block(const PackedLinear& p, const Operands<F>& o, int64_t first, int64_t last, int64_t panel,
                           int64_t end) {
  thread_local Scratch memory;
  constexpr int64_t STRIP_SIZE = STRIP<F> * PANEL;
  const int64_t size = o.block * STRIP_SIZE;
  float* const c = memory.reserve<float>(o.group * size);
  int64_t k = 0;
  do {  // once, too, if K is 0: sums of nothing are 0
    const int64_t depth = o.depth - k < CHUNK<F> ? o.depth - k : CHUNK<F>;
    for (int64_t q = panel; q < end; ++q) {
      const F* const weight = (const F*)p.weight.operands + (q * o.depth + k) * PANEL;
      for (int64_t s = first; s < last; ++s)
        multiply_strip<STRIP<F>>(o.strips.rows(s), o.strip(s) + k * STRIP<F>, weight, depth,
                                 c + (q - panel) * size + (s - first) * STRIP_SIZE, k == 0);
    }
  } while ((k += CHUNK<F>) < o.depth);
  for (int64_t q = panel; q < end; ++q) {
    const int64_t left = p.weight.columns - q * PANEL;
    const int count = left < PANEL ? (int)left : PANEL;
    const Columns columns(p, q * PANEL, count);
    with_type(p.y.type, [&]<class Y>(Y) {
      for (int64_t s = first; s < last; ++s)
        for (int i = 0; i < o.strips.rows(s); ++i)
          write<Accumulator<F>>(p, c + (q - panel) * size + (s - first) * STRIP_SIZE + i * PANEL, columns, count,
                                o.tokens[s * STRIP<F> + i], row<Y>(p.y, s * o.strips.height + i) + q * PANEL);
    });
  }
}

template <class F>
static void multiply(const PackedLinear& p) {
  const Operands<F> o(p);
  const int64_t grain = 1 + (32 << 10) / (STRIP<F> * (o.depth + 1));  // below, a second thread costs more than it saves
  parallel(o.strips.count, grain, [&](int64_t first, int64_t end) {
    with_type(p.x.type, [&]<class T>(T) {
      for (int64_t s = first; s < end; ++s)
        pack_strip<T>(p, s * o.strips.height, o.strips.rows(s), o.width, o.strip(s), o.tokens + s * STRIP<F>);
    });
  });
  parallel(o.blocks * o.panels, 1, [&](int64_t task, int64_t end) {
    [[maybe_unused]] const TileRegisters<F> registers;
    while (task < end) {
      const int64_t first = task / o.panels * o.block, panel = task % o.panels;
      const int64_t last = first + o.block < o.strips.count ? first + o.block : o.strips.count;
      int64_t count = o.panels - panel < end - task ? o.panels - panel : end - task;
      if (count > o.group) count = o.group;
      multiply_block(p, o, first, last, panel, panel + count);
      task += count;
    }
  });
}

void packed_linear(const PackedLinear& p) {
  if (p.tokens == 0) return;
  switch (p.weight.type) {
    case WeightType::float32: return multiply<float>(p);
    case WeightType::bfloat16: return multiply<uint32_t>(p);
    case WeightType::int8:
#if defined(__x86_64__)
      if (p.tokens > MAX_TOKENS_WITHOUT_TILES && has_tiles()) return multiply<Tiled>(p);
#endif
      return has_quad_instruction() ? multiply<Quad<true>>(p) : multiply<Quad<false>>(p);
  }
}

}  // namespace bertfast::BERTFAST_SET
