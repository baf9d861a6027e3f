// y = LN(z), z = gelu(x + bias), exact GELU, and its gradients.
#pragma once
#include "cpu/instruction_set.h"
#include "tensors.h"

namespace bertfast {

struct GeluLayerNormForward {
  int64_t count, hidden;
  Rows x;                    // [R, H]
  Vector bias, gamma, beta;  // [H]; bias and beta may be absent
  float eps;
  Rows y;              // [R, H], of gamma's type
  float *mean, *rstd;  // [R], of z
};

struct GeluLayerNormBackward {
  int64_t count, hidden;
  Rows d_y;                  // [R, H], of gamma's type
  Rows x;                    // [R, H]
  Vector bias, gamma;        // [H]
  const float *mean, *rstd;  // [R]
  Rows d_x;                  // [R, H], of x's type
  float* sums;               // [parts, 3, H]: partial sums of d_gamma, d_beta and d_bias
  int parts;                 // 1 on a CPU
};

}  // namespace bertfast

BERTFAST_KERNEL(gelu_layer_norm_forward, GeluLayerNormForward)
BERTFAST_KERNEL(gelu_layer_norm_backward, GeluLayerNormBackward)
