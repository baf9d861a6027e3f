// What attention's two passes share. A block is BLOCK queries by BLOCK keys, transposed: [key][query], so that what is
// done for each query (maximum, sum, rescaling) is done lane by lane.
#pragma once
#include "attention.h"
#include "block_product.h"
#include "parallel.h"
#include "scratch.h"

namespace bertfast::BERTFAST_SET {

constexpr int BLOCK = 64;
constexpr float LOG2_E = 1.4426950408889634f;

INLINE int rounded_up(int64_t x, int multiple) { return (int)((x + multiple - 1) / multiple * multiple); }

// Pieces of a thread's scratch memory, handed out one after another.
class Pieces {
 public:
  explicit Pieces(char* memory) : next_(memory) {}
  template <class T>
  T* take(int64_t count) {
    T* const piece = reinterpret_cast<T*>(next_);
    next_ += (count * sizeof(T) + 63) / 64 * 64;
    return piece;
  }

 private:
  char* next_;
};

// Elements of a product are pairs where bf16 is multiplied in pairs.
template <class E>
constexpr int ELEMENTS = sizeof(E) == 4 && static_cast<E>(-1) > static_cast<E>(0) ? 2 : 1;  // numbers in one

// Rows as they are, for products over a row: out[padded][width / ELEMENTS], zero from `count` on.
template <class E, class T>
INLINE void pack_rows(const T* rows, int64_t stride, int count, int padded, int width, E* out) {
  for (int i = 0; i < padded; ++i) {
    E* const to = out + i * (width / ELEMENTS<E>);
    if (i >= count) {
      std::memset(to, 0, width / ELEMENTS<E> * sizeof(E));
    } else if constexpr (ELEMENTS<E> == 2) {
      std::memcpy(to, rows + i * stride, width * sizeof(T));
    } else {
      for (int k = 0; k < width; k += LANES) store(to + k, load(rows + i * stride + k));
    }
  }
}

// For products over the rows: out[padded / ELEMENTS][width], the pairs of two rows each.
template <class E, class T>
INLINE void pack_over_rows(const T* rows, int64_t stride, int count, int padded, int width, E* out) {
  if constexpr (ELEMENTS<E> == 1) {
    pack_rows(rows, stride, count, padded, width, out);
  } else {
    for (int i = 0; i < padded; i += 2)
      for (int k = 0; k < width; k += LANES) {
        const Floats first = i < count ? load(rows + i * stride + k) : Floats{};
        const Floats second = i + 1 < count ? load(rows + (i + 1) * stride + k) : Floats{};
        store(out + i / 2 * width + k, pair(first, second));
      }
  }
}

// Columns of rows: out[width / ELEMENTS][BLOCK].
template <class E, class T>
INLINE void pack_columns(const T* rows, int64_t stride, int count, int columns, int width, E* out) {
  if constexpr (ELEMENTS<E> == 1)
    pack_transposed(rows, stride, count, width, columns, out, BLOCK);
  else
    pack_transposed((const uint32_t*)rows, stride / 2, count, width / 2, columns, out, BLOCK);
}

// Which keys a query may see: those first … end - 1 of its sequence.
struct Range {
  int64_t first, end;
};

INLINE Range visible(const AttentionInput& a, int64_t first_query, int64_t end_query, int64_t length) {
  const int64_t after = a.causal ? end_query : end_query + a.window;
  return {first_query > a.window ? first_query - a.window : 0, after < length ? after : length};
}

// Whether every query of a block sees every key of it.
INLINE bool sees_all(const AttentionInput& a, int64_t query, int64_t queries, int64_t key, int64_t keys) {
  return !(a.causal && key + keys - 1 > query) && query + queries - 1 - key <= a.window &&
         key + keys - 1 - query <= a.window;
}

// Of the queries in a register, from `query` on: all ones where one sees the key.
INLINE Ints sees(const AttentionInput& a, int64_t query, int64_t key) {
  const Ints distance = (Ints)lane_numbers() + (int)(query - key);
  const int window = a.window < 1 << 30 ? (int)a.window : 1 << 30;
  return (distance <= window) & (distance >= (a.causal ? 0 : -window));
}

// The mask of a block, as bytes: of 16 keys by 16 queries 16 calls of Philox each, of which word
// 2 · (query / 8 % 2) + key / 8 % 2 has in its key group / query group the bytes of two queries and two keys; see
// bertfast/dropout.py. As 16-bit numbers, [word][key group][query % 8], they are in the order of the queries, an even
// key in the lower byte and the odd one after it in the upper.
class BlockMask {
 public:
  void draw(const AttentionInput& a, const AttentionTask& task, int64_t query, int queries, int64_t key, int keys) {
    const uint32_t number = (uint32_t)a.numbers[task.sequence], word = a.word | (uint32_t)task.head;
    for (int k = 0; k < keys; k += 16)
      for (int q = 0; q < queries; q += 16) {
        uint32_t* const tile = (uint32_t*)tiles_[k / 16][q / 16];
        UNROLL for (int call = 0; call < 16; call += LANES) {
          const Words lanes = lane_numbers() + (uint32_t)call;
          const uint32_t key_group = (uint32_t)(key + k) / 16 * 4, query_group = (uint32_t)(query + q) / 16 * 4;
          Words words[4];
          philox((lanes >> 2) + key_group, (lanes & 3) + query_group, number, word, a.seed, words);
          UNROLL for (int i = 0; i < 4; ++i) store(tile + 16 * i + call, words[i]);
        }
      }
  }

  // Of a register of queries from the block's `query` on: the bytes of its key `key`, which is even, and of the next.
  INLINE_MEMBER Words bytes(int query, int key) const {
    constexpr int PART = LANES < 8 ? LANES : 8;
    const uint16_t* const tile = tiles_[key / 16][query / 16];
    Halves some;
    UNROLL for (int i = 0; i < LANES; i += PART) {
      const int word = 2 * ((query + i) / 8 % 2) + key / 8 % 2, group = key / 2 % 4;
      std::memcpy((uint16_t*)&some + i, tile + (4 * word + group) * 8 + query % 8, PART * sizeof(uint16_t));
    }
    return __builtin_convertvector(some, Words);
  }

 private:
  alignas(64) uint16_t tiles_[BLOCK / 16][BLOCK / 16][128];
};

// f with a value of the storage's C++ type and one of the products' elements.
template <class F>
INLINE void with_elements(Type type, const F& f) {
  if (type == Type::float32)
    f(float{}, float{});
  else if constexpr (HAS_PAIRS)
    f(BFloat16{}, uint32_t{});
  else
    f(BFloat16{}, float{});
}

}  // namespace bertfast::BERTFAST_SET
