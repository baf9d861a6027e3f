// Dropout masks of bertfast/ops/dropout.py for a block of attention probabilities.
#pragma once
#include "../attention.h"
#include "vector.h"

namespace bertfast::BERTFAST_SET {

using LaneMask = Ints;  // all ones or zero in each lane

INLINE Floats where(LaneMask mask, Floats x) { return (Floats)(mask & (Ints)x); }

// Random bytes [keys / 2, ATTENTION_BLOCK]: for each query those of two adjacent keys, the even key in the lower byte.
class DropoutBlock {
 public:
  // Draw the bytes of a block that starts at q_begin and kv_begin, multiples of 16.
  void draw(const AttentionDropout& dropout, int sequence, int head, int q_begin, int queries, int kv_begin, int keys) {
    const uint64_t seed = *dropout.seed;
    const uint32_t sequence_id = (uint32_t)dropout.sequence_ids[sequence];
    const uint32_t counter_word = dropout.counter_word | (uint32_t)head;
    for (int query = 0; query < queries; query += 16)
      for (int key = 0; key < keys; key += 16)
        for (int call = 0; call < 16; call += LANES) {  // 4 key groups by 4 query groups
          const Words calls = lane_ids() + (uint32_t)call;
          const Words key_group = (uint32_t)(kv_begin + key) / 4 + calls / 4;
          const Words query_group = (uint32_t)(q_begin + query) / 4 + calls % 4;
          Words words[4];
          philox(key_group, query_group, sequence_id, counter_word, seed, words);
          // Word i is for the keys 2 (i % 2) … and the queries 8 (i / 2) … of a group: 16 bytes are 8 queries of two
          // keys.
          UNROLL_FOR (int i = 0; i < 4; ++i)
            UNROLL_FOR (int group = 0; group < LANES / 4; ++group) {
              uint16_t* const row = bytes_[key / 2 + 4 * (i % 2) + call / 4 + group];
              std::memcpy(row + query + 8 * (i / 2), (const char*)&words[i] + 16 * group, 16);
            }
        }
  }

  // Whether an even key and the next one are kept, for LANES queries.
  [[gnu::always_inline]] void kept(int key, int query, int threshold, LaneMask& even, LaneMask& odd) const {
    const Ints both = (Ints)load_words(&bytes_[key / 2][query]);
    even = (both & 0xff) >= threshold;
    odd = both >= threshold << 8;
  }

 private:
  uint16_t bytes_[ATTENTION_BLOCK / 2][ATTENTION_BLOCK];
};

}  // namespace bertfast::BERTFAST_SET
