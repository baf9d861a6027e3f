// Dropout masks of bertfast/ops/dropout.py: Philox4x32-10 (Salmon et al., 2011).
#pragma once
#include "load_store.cuh"

namespace bertfast::cuda {

struct PhiloxWords {
  uint32_t word[4];
};

DEVICE PhiloxWords philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed) {
  uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
  UNROLL_FOR (int round = 0; round < 10; ++round) {
    const uint64_t a = (uint64_t)c0 * 0xD2511F53u, b = (uint64_t)c2 * 0xCD9E8D57u;
    c0 = (uint32_t)(b >> 32) ^ c1 ^ key0;
    c1 = (uint32_t)b;
    c2 = (uint32_t)(a >> 32) ^ c3 ^ key1;
    c3 = (uint32_t)a;
    key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

DEVICE float scale_of(int threshold) { return 256.f / (float)(256 - threshold); }

// Dropout factors of a row of hidden activations: 0 or the scale.
class HiddenMask {
 public:
  DEVICE HiddenMask(const HiddenDropout& dropout, int64_t token) : dropout_(dropout) {
    if (dropout.threshold == 0) return;
    seed_ = *dropout.seed, scale_ = scale_of(dropout.threshold);
    position_ = (uint32_t)dropout.positions[token], sequence_id_ = (uint32_t)dropout.sequence_ids[token];
  }

  DEVICE bool drops() const { return dropout_.threshold != 0; }

  // The factors of 8 columns; `column` is a multiple of 8. A Philox call covers 16 columns.
  DEVICE void factors(int column, float (&factor)[8]) const {
    const PhiloxWords drawn = philox((uint32_t)column / 16, position_, sequence_id_, dropout_.counter_word, seed_);
    const bool upper = column % 16 != 0;
    const uint32_t first = upper ? drawn.word[2] : drawn.word[0], second = upper ? drawn.word[3] : drawn.word[1];
    UNROLL_FOR (int i = 0; i < 8; ++i) {
      const uint32_t byte = ((i < 4 ? first : second) >> i % 4 * 8) & 0xff;
      factor[i] = byte >= (uint32_t)dropout_.threshold ? scale_ : 0.f;
    }
  }

 private:
  const HiddenDropout& dropout_;
  uint64_t seed_;
  float scale_;
  uint32_t position_, sequence_id_;
};

}  // namespace bertfast::cuda
