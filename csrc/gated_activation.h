// y = act(hidden + bias) · (gate + gate bias), the halves of a row, and its gradients.
#pragma once
#include "cpu/instruction_set.h"
#include "tensors.h"

namespace bertfast {

enum class Activation { gelu, gelu_tanh, silu };

struct GatedActivationForward {
  int64_t tokens, columns;
  Rows x;       // [T, 2 columns]: hidden, then gate
  Vector bias;  // [2 columns]
  Activation activation;
  Rows y;  // [T, columns], of x's type
};

struct GatedActivationBackward {
  int64_t tokens, columns;
  Rows d_y;     // [T, columns], of x's type
  Rows x;       // [T, 2 columns]
  Vector bias;  // [2 columns]
  Activation activation;
  Rows d_x;       // [T, 2 columns], of x's type
  float* d_bias;  // [2 columns]; null if there is no bias
};

}  // namespace bertfast

BERTFAST_KERNEL(gated_activation_forward, GatedActivationForward)
BERTFAST_KERNEL(gated_activation_backward, GatedActivationBackward)
