// Tensors as kernels see them: plain pointers, so that no kernel includes PyTorch.
//
// T tokens, H hidden, A heads, D head dimension, R gathered rows, V vocabulary.
#pragma once
#include <cstdint>

namespace bertfast {

enum class Type { float32, bfloat16, float16 };  // the last on a GPU alone

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// [rows, columns] of which each row's elements are adjacent.
struct Rows {
  void* data;
  Type type;
  int64_t stride;  // elements from a row to the next
};

// Elements that are adjacent.
struct Vector {
  const void* data;  // null: there is none
  Type type;
};

// Of hidden activations; see bertfast/ops/dropout.py.
struct HiddenDropout {
  const uint64_t* seed;
  const int64_t* number;    // [T], the tokens' sequences
  const int64_t* position;  // [T]
  uint32_t word;
  int threshold;  // 0: nothing is dropped
};

}  // namespace bertfast
