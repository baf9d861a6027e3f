// y = LN(z), z = residual + dropout(x + bias), and its gradients.
#pragma once
#include "cpu/instruction_set.h"
#include "tensors.h"

namespace bertfast {

struct AddLayerNormForward {
  int64_t tokens, hidden;
  Rows x, residual;          // [T, H]
  Vector bias, gamma, beta;  // [H]; bias and beta may be absent
  float eps;
  HiddenDropout dropout;
  Rows y;              // [T, H], of residual's type
  Rows copy;           // [T, H], y rounded to 16 bits (bf16 on a CPU); data is null if no copy is requested
  float *mean, *rstd;  // [T], of z
};

struct AddLayerNormBackward {
  int64_t tokens, hidden;
  Rows d_y, d_copy;          // [T, H], of the types of y and copy; the data of one may be null
  Rows x, residual;          // [T, H]
  Vector bias, gamma;        // [H]
  const float *mean, *rstd;  // [T]
  HiddenDropout dropout;
  Rows d_x;         // [T, H], of x's type; data is null if it equals d_residual
  Rows d_residual;  // [T, H], of residual's type
  float* sums;      // [parts, 3, H]: partial sums of d_gamma, d_beta and d_bias
  int parts;        // 1 on a CPU
};

}  // namespace bertfast

BERTFAST_KERNEL(add_layer_norm_forward, AddLayerNormForward)
BERTFAST_KERNEL(add_layer_norm_backward, AddLayerNormBackward)
