// The masks of bertfast/dropout.py for rows of hidden activations.
#pragma once
#include "vector.h"

namespace bertfast::BERTFAST_SET {

// The bytes of one token's row of H hidden activations, in the order of its columns; `bytes` has room for H rounded up
// to a multiple of 16 · LANES.
INLINE void hidden_bytes(const HiddenDropout& dropout, int64_t token, int64_t hidden, uint8_t* bytes) {
  const uint32_t position = (uint32_t)dropout.position[token], number = (uint32_t)dropout.number[token];
  for (int64_t column = 0; column < hidden; column += 16 * LANES) {
    Words words[4];
    philox(lane_numbers() + (uint32_t)(column / 16), splat(position), number, dropout.word, dropout.seed, words);
    UNROLL for (int lane = 0; lane < LANES; ++lane) {
      const uint32_t call[4] = {words[0][lane], words[1][lane], words[2][lane], words[3][lane]};
      std::memcpy(bytes + column + 16 * lane, call, 16);
    }
  }
}

// 0 where dropped, else the scale of what is kept: of LANES columns, from their bytes.
INLINE Floats factors(const uint8_t* bytes, int threshold) {
  Bytes some;
  std::memcpy(&some, bytes, sizeof some);
  const Words wide = __builtin_convertvector(some, Words);
  const Floats scale = splat(256.f / (256 - threshold));
  return wide >= splat((uint32_t)threshold) ? scale : splat(0.f);
}

}  // namespace bertfast::BERTFAST_SET
