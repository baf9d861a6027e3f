// Rotary position embedding of queries and keys, and its inverse, which is its gradient.
#pragma once
#include "cpu/instruction_set.h"
#include "tensors.h"

namespace bertfast {

// For queries and keys y[i] = x[i] cos[i] - x[i + D/2] sin[i], y[i + D/2] = x[i + D/2] cos[i] + x[i] sin[i]; values are
// copied.
struct Rotary {
  int64_t tokens, heads, head_dim;
  Rows x;        // [T, 3 A D]
  Rows table;    // float32 [T, D]: the cosines of D/2 angles, then their sines
  bool inverse;  // rotate by the negative angles
  Rows y;        // [T, 3 A D], of x's type
};

}  // namespace bertfast

BERTFAST_KERNEL(rotary, Rotary)
