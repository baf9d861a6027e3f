// Dropout masks of bertfast/ops/dropout.py for rows of hidden activations.
#pragma once
#include "scratch.h"
#include "vector.h"

namespace bertfast::BERTFAST_SET {

// The mask of one token's row.
class HiddenMask {
 public:
  HiddenMask(const HiddenDropout& dropout, int64_t hidden, Scratch& memory)
      : dropout_(dropout), hidden_(hidden), scale_(splat(256.f / (256 - dropout.threshold))) {
    if (dropout.threshold) bytes_ = memory.reserve<uint8_t>((hidden + DRAWN - 1) / DRAWN * DRAWN);
  }

  // Draw the random bytes of a row; does nothing without dropout.
  [[gnu::always_inline]] void draw(int64_t token) {
    if (bytes_ == nullptr) return;
    const uint64_t position = (uint32_t)dropout_.positions[token], sequence_id = (uint32_t)dropout_.sequence_ids[token];
    for (int64_t column = 0; column < hidden_; column += DRAWN) {
      // A Philox call covers 16 columns; its counter is (column / 16, position, sequence id, counter word).
      Longs calls[CALLS][4];
      UNROLL_FOR (int i = 0; i < CALLS; ++i) {
        const Longs group = call_ids() + (uint64_t)(column / 16 + i * (LANES / 2));
        calls[i][0] = group, calls[i][1] = position - Longs{};
        calls[i][2] = sequence_id - Longs{}, calls[i][3] = dropout_.counter_word - Longs{};
      }
      philox(calls, *dropout_.seed);
      UNROLL_FOR (int i = 0; i < CALLS; ++i) store_calls(bytes_ + column + i * 8 * LANES, calls[i]);
    }
  }

  // Return rest + dropout(x) for LANES columns. Forward and backward pass both call this, so that multiplication and
  // addition are fused in both or in neither, and their results are bitwise identical.
  [[gnu::always_inline]] Floats add(int64_t column, Floats x, Floats rest) const {
    return bytes_ == nullptr ? rest + x : x * factors(column) + rest;
  }

  // Return dropout(x) for LANES columns.
  [[gnu::always_inline]] Floats operator()(int64_t column, Floats x) const {
    return bytes_ == nullptr ? x : x * factors(column);
  }

 private:
  static constexpr int CALLS = 2;  // interleaved Philox calls per lane, to hide the latency of the multiplications
  static constexpr int DRAWN = CALLS * 8 * LANES;

  [[gnu::always_inline]] Floats factors(int64_t column) const {
    const Ints kept = load(bytes_ + column) >= dropout_.threshold;
    return (Floats)(kept & (Ints)scale_);
  }

  const HiddenDropout dropout_;
  const int64_t hidden_;
  const Floats scale_;
  uint8_t* bytes_ = nullptr;
};

}  // namespace bertfast::BERTFAST_SET
