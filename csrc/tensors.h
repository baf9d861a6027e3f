// Tensors as the kernels take them: plain pointers, so that no kernel includes PyTorch.
//
// T token slots, S sequences, H hidden size, A heads, D head dimension, R gathered rows, V vocabulary size.
#pragma once
#include <cstdint>

namespace bertfast {

enum class Type { float32, bfloat16, float16 };  // float16 on a GPU only

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// A matrix [rows, columns] whose rows are contiguous.
struct Rows {
  void* data;
  Type type;
  int64_t stride;  // elements from one row to the next
};

// A contiguous vector.
struct Vector {
  const void* data;  // null: absent
  Type type;
};

// Dropout of hidden activations; see bertfast/ops/dropout.py.
struct HiddenDropout {
  const uint64_t* seed;
  const int64_t* sequence_ids;  // [T]
  const int64_t* positions;     // [T], of each token in its sequence
  uint32_t counter_word;
  int threshold;  // of 256; 0: no dropout
};

}  // namespace bertfast
