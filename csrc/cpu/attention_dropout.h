// The masks of bertfast/ops/dropout.py for a block of attention's probabilities.
#pragma once
#include "../attention.h"
#include "vector.h"

namespace bertfast::BERTFAST_SET {

using Mask = Ints;  // of lanes, all ones or zero

INLINE Floats where(Mask mask, Floats x) { return (Floats)(mask & (Ints)x); }

// The bytes of two neighbouring keys, the even one's lower, for each query: [keys / 2, ATTENTION_BLOCK].
class DropoutBlock {
 public:
  // For queries and keys from the first ones on, which are multiples of 16.
  void draw(const AttentionDropout& dropout, int sequence, int head, int first_query, int queries, int first_key,
            int keys) {
    const uint64_t seed = *dropout.seed;
    const uint32_t number = (uint32_t)dropout.number[sequence], word = dropout.word | (uint32_t)head;
    for (int query = 0; query < queries; query += 16)
      for (int key = 0; key < keys; key += 16)
        for (int call = 0; call < 16; call += LANES) {  // 4 key groups by 4 query groups
          const Words calls = lane_numbers() + (uint32_t)call;
          const Words key_group = (uint32_t)(first_key + key) / 4 + calls / 4;
          const Words query_group = (uint32_t)(first_query + query) / 4 + calls % 4;
          Words words[4];
          philox(key_group, query_group, number, word, seed, words);
          UNROLL for (int i = 0; i < 4; ++i)
            UNROLL for (int group = 0; group < LANES / 4; ++group) {
              uint16_t* const row = bytes_[key / 2 + 4 * (i % 2) + call / 4 + group];
              std::memcpy(row + query + 8 * (i / 2), (const char*)&words[i] + 16 * group, 16);
            }
        }
  }

  // Whether an even key and the next one are kept, of LANES queries.
  [[gnu::always_inline]] void kept(int key, int query, int threshold, Mask& even, Mask& odd) const {
    const Ints both = (Ints)load_words(&bytes_[key / 2][query]);
    even = (both & 0xff) >= threshold;
    odd = both >= threshold << 8;
  }

 private:
  uint16_t bytes_[ATTENTION_BLOCK / 2][ATTENTION_BLOCK];
};

}  // namespace bertfast::BERTFAST_SET
