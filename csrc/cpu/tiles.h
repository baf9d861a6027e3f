// Dot products of int8 by AMX, exactly in int32: of 16 tokens and 16 columns at a time, in tile registers.
//
// A tile register has 16 rows of 64 bytes. The instruction adds A · B to C: a row of A has 16 operands of a token, a
// row of B an operand of each of 16 columns, as rows of a packed weight do, and a row of C 16 sums of a token.
//
// The instructions are written as assembly for the same reason as in quads.h. All of it is in templates that are
// instantiated for x86-64 only.
#pragma once
#include <type_traits>

#include "../packed_linear.h"
#include "quads.h"

namespace bertfast::BERTFAST_SET {

constexpr int TILE_ROWS = 16, TILE_OPERANDS = 16;  // operands: in a row

// Four uint8 of a token, or int8 of a weight, that are multiplied in tile registers.
struct Tiled {
  uint32_t bits;
};
template <>
constexpr bool IS_QUAD<Tiled> = true;
template <class F>
constexpr bool IS_TILED = std::is_same_v<F, Tiled>;

// What the instruction `ldtilecfg` reads.
struct alignas(64) TileConfiguration {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];  // of each register; there are eight
  uint8_t rows[16];
};
static_assert(sizeof(TileConfiguration) == 64);

// The tile registers of the calling thread, usable while this exists; nothing for other operands. A thread that did not
// release them would have 8 KiB more to save at each context switch.
template <class F>
struct TileRegisters {};

template <class F>
  requires IS_TILED<F>
struct TileRegisters<F> {
  [[gnu::noinline]] TileRegisters() {
    static constexpr TileConfiguration ALL_WHOLE = {
        1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    asm volatile("ldtilecfg %0" : : "m"(ALL_WHOLE));
  }
  [[gnu::noinline]] ~TileRegisters() { asm volatile("tilerelease"); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

template <int TILE>
INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(TILE));
}

// Load 16 rows of 16 operands or sums, `stride` of them apart.
template <int TILE>
INLINE void load_tile(const void* p, int64_t stride) {
  asm volatile("tileloadd (%1,%2,4), %%tmm%c0" : : "i"(TILE), "r"(p), "r"(stride) : "memory");
}

template <int TILE>
INLINE void store_tile(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,4)" : : "i"(TILE), "r"(p), "r"(stride) : "memory");
}

// C += A · B, of uint8 in A and int8 in B.
template <int C, int A, int B>
INLINE void multiply_tiles() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

template <int TILE>
INLINE void start_sums(const float* c, bool first) {
  first ? zero_tile<TILE>() : load_tile<TILE>(c, PANEL);
}

// c [ROWS · 16, PANEL] from a [depth / 16, 2, 16, 16], depth rounded up, and b [depth, PANEL]; added to c unless
// `first`. Registers 0 … 3 hold c, 4 and 5 tokens, 6 and 7 the weight.
template <int ROWS>
[[gnu::noinline]] static void multiply_in_tiles(const Tiled* a, const Tiled* b, int64_t depth, float* c, bool first) {
  constexpr int COLUMNS = PANEL / 2, SIZE = TILE_ROWS * TILE_OPERANDS;
  static_assert(COLUMNS == TILE_OPERANDS);
  // The weight ends with its last operand, which need not be the last of a tile: it is padded with zeros here.
  alignas(64) Tiled padded[TILE_OPERANDS * PANEL];
  const int64_t left = depth % TILE_OPERANDS;
  if (left > 0) {
    std::memcpy(padded, b + (depth - left) * PANEL, left * PANEL * sizeof(Tiled));
    std::memset(padded + left * PANEL, 0, (TILE_OPERANDS - left) * PANEL * sizeof(Tiled));
  }
  start_sums<0>(c, first), start_sums<1>(c + COLUMNS, first);
  float* const lower = c + TILE_ROWS * PANEL;
  if constexpr (ROWS == 2) start_sums<2>(lower, first), start_sums<3>(lower + COLUMNS, first);
  for (int64_t k = 0; k < depth; k += TILE_OPERANDS, a += 2 * SIZE) {
    const Tiled* const weight = depth - k < TILE_OPERANDS ? padded : b + k * PANEL;
    load_tile<6>(weight, PANEL), load_tile<4>(a, TILE_OPERANDS), multiply_tiles<0, 4, 6>();
    load_tile<7>(weight + COLUMNS, PANEL), multiply_tiles<1, 4, 7>();
    if constexpr (ROWS == 2) {
      load_tile<5>(a + SIZE, TILE_OPERANDS);
      multiply_tiles<2, 5, 6>(), multiply_tiles<3, 5, 7>();
    }
  }
  store_tile<0>(c, PANEL), store_tile<1>(c + COLUMNS, PANEL);
  if constexpr (ROWS == 2) store_tile<2>(lower, PANEL), store_tile<3>(lower + COLUMNS, PANEL);
}

}  // namespace bertfast::BERTFAST_SET
