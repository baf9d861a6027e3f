// y = gelu(x + bias) and its gradients.
#pragma once
#include "cpu/instruction_set.h"
#include "tensors.h"

namespace bertfast {

struct BiasGeluForward {
  int64_t tokens, columns;
  Rows x;       // [T, columns]
  Vector bias;  // [columns]
  bool tanh;    // the tanh approximation of GELU
  Rows y;       // [T, columns], of x's type
};

struct BiasGeluBackward {
  int64_t tokens, columns;
  Rows d_y, x;  // [T, columns], of the same type
  Vector bias;  // [columns]
  bool tanh;
  Rows d_x;       // [T, columns], of x's type
  float* d_bias;  // [parts, columns], partial sums
  int parts;      // 1 on a CPU
};

}  // namespace bertfast

BERTFAST_KERNEL(bias_gelu_forward, BiasGeluForward)
BERTFAST_KERNEL(bias_gelu_backward, BiasGeluBackward)
