// stream = residual + dropout(x + bias), its LayerNorm or RMSNorm, and their gradients. The statistics are those of the
// stored stream, from which the backward pass computes everything.
#pragma once
#include "cpu/instruction_set.h"
#include "tensors.h"

namespace bertfast {

struct PreNormForward {
  int64_t tokens, hidden;
  Rows x;                    // [T, H]; data is null if nothing is added
  Rows residual;             // [T, H]
  Vector bias, gamma, beta;  // [H]
  float eps;
  bool rms;
  HiddenDropout dropout;
  Rows stream;         // [T, H], of residual's type; not written without x
  Rows normed;         // [T, H]
  float *mean, *rstd;  // [T]; the mean is not written if rms
};

struct PreNormBackward {
  int64_t tokens, hidden;
  Rows d_stream, d_normed;   // [T, H]; the data of one may be null
  Rows stream;               // [T, H]
  Vector gamma;              // [H]
  const float *mean, *rstd;  // [T]
  bool rms, has_bias;
  HiddenDropout dropout;
  Rows d_x;         // [T, H]; data is null if it equals d_residual or there is no x
  Rows d_residual;  // [T, H], of stream's type
  float* sums;      // [3, H]: d_gamma, d_beta (0 if rms) and d_bias (0 without a bias)
};

}  // namespace bertfast

BERTFAST_KERNEL(pre_norm_forward, PreNormForward)
BERTFAST_KERNEL(pre_norm_backward, PreNormBackward)
