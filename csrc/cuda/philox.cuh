// Dropout masks of bertfast/ops/dropout.py: Philox4x32-10 (Salmon et al., 2011).
#pragma once
#include "load_store.cuh"

namespace bertfast::cuda {

struct PhiloxWords {
  uint32_t word[4];
};

// The keys of the rounds, so that calls with one seed share them.
struct PhiloxKeys {
  static constexpr int ROUNDS = 10;
  uint32_t key[2][ROUNDS];

  PhiloxKeys() = default;
  DEVICE explicit PhiloxKeys(const uint32_t (&seed)[2]) {
    UNROLL_FOR (uint32_t round = 0; round < ROUNDS; ++round) {
      key[0][round] = seed[0] + round * 0x9E3779B9u;
      key[1][round] = seed[1] + round * 0xBB67AE85u;
    }
  }
};

DEVICE PhiloxWords philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, const PhiloxKeys& keys) {
  UNROLL_FOR (int round = 0; round < PhiloxKeys::ROUNDS; ++round) {
    const uint64_t a = (uint64_t)c0 * 0xD2511F53u, b = (uint64_t)c2 * 0xCD9E8D57u;
    c0 = (uint32_t)(b >> 32) ^ c1 ^ keys.key[0][round];
    c1 = (uint32_t)b;
    c2 = (uint32_t)(a >> 32) ^ c3 ^ keys.key[1][round];
    c3 = (uint32_t)a;
  }
  return {{c0, c1, c2, c3}};
}

DEVICE float keep_probability(int threshold) { return (float)(256 - threshold) * (1 / 256.f); }
DEVICE float scale_of(int threshold) { return 256.f / (float)(256 - threshold); }

// Dropout of a row of hidden activations: factors that are 0 or the scale.
class HiddenMask {
 public:
  DEVICE HiddenMask(const HiddenDropout& dropout, int64_t token) : dropout_(dropout) {
    if (dropout.threshold == 0) return;
    seed_[0] = (uint32_t)*dropout.seed, seed_[1] = (uint32_t)(*dropout.seed >> 32),
    scale_ = scale_of(dropout.threshold);
    position_ = (uint32_t)dropout.positions[token], sequence_id_ = (uint32_t)dropout.sequence_ids[token];
  }

  DEVICE bool drops() const { return dropout_.threshold != 0; }

  // Which of 8 columns are kept, as bits; `column` is a multiple of 8. A Philox call covers 16 columns.
  DEVICE uint32_t kept(int column) const {
    const PhiloxWords drawn =
        philox((uint32_t)column / 16, position_, sequence_id_, dropout_.counter_word, PhiloxKeys(seed_));
    const bool upper = column % 16 != 0;
    const uint32_t first = upper ? drawn.word[2] : drawn.word[0], second = upper ? drawn.word[3] : drawn.word[1];
    uint32_t bits = 0;
    UNROLL_FOR (int i = 0; i < 8; ++i) {
      const uint32_t byte = ((i < 4 ? first : second) >> i % 4 * 8) & 0xff;
      bits |= (uint32_t)(byte >= (uint32_t)dropout_.threshold) << i;
    }
    return bits;
  }

  // The factor of column i of 8 of which these are kept.
  DEVICE float factor(uint32_t kept, int i) const { return kept >> i & 1 ? scale_ : 0.f; }

 private:
  const HiddenDropout& dropout_;
  uint32_t seed_[2];
  float scale_;
  uint32_t position_, sequence_id_;
};

}  // namespace bertfast::cuda
