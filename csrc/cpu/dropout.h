// The masks of bertfast/ops/dropout.py for rows of hidden activations.
#pragma once
#include "scratch.h"
#include "vector.h"

namespace bertfast::BERTFAST_SET {

// The mask of one token's row at a time.
class HiddenMask {
 public:
  HiddenMask(const HiddenDropout& dropout, int64_t hidden, Scratch& memory)
      : dropout_(dropout), hidden_(hidden), scale_(splat(256.f / (256 - dropout.threshold))) {
    if (dropout.threshold) bytes_ = memory.room<uint8_t>((hidden + DRAWN - 1) / DRAWN * DRAWN);
  }

  // Draws a row's bytes; without dropout there are none.
  [[gnu::always_inline]] void draw(int64_t token) {
    if (bytes_ == nullptr) return;
    const uint64_t position = (uint32_t)dropout_.position[token], number = (uint32_t)dropout_.number[token];
    for (int64_t column = 0; column < hidden_; column += DRAWN) {
      Longs calls[CALLS][4];
      UNROLL for (int i = 0; i < CALLS; ++i) {
        const Longs group = call_numbers() + (uint64_t)(column / 16 + i * (LANES / 2));
        calls[i][0] = group, calls[i][1] = position - Longs{};
        calls[i][2] = number - Longs{}, calls[i][3] = dropout_.word - Longs{};
      }
      philox(calls, *dropout_.seed);
      UNROLL for (int i = 0; i < CALLS; ++i) store_calls(bytes_ + column + i * 8 * LANES, calls[i]);
    }
  }

  // rest + x where x is kept, scaled, else the rest: of LANES columns. Every caller gets the same bits, because whether
  // product and sum are rounded apart is decided here.
  [[gnu::always_inline]] Floats add(int64_t column, Floats x, Floats rest) const {
    return bytes_ == nullptr ? rest + x : x * factors(column) + rest;
  }

  // x where kept, scaled, else 0.
  [[gnu::always_inline]] Floats operator()(int64_t column, Floats x) const {
    return bytes_ == nullptr ? x : x * factors(column);
  }

 private:
  static constexpr int CALLS = 2;  // of Philox at a time in a lane, so that one need not wait for its products
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
