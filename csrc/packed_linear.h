// y = activation(x Wᵀ + bias), for inference, with a weight that was packed once: in fp32, bf16 or int8.
#pragma once
#include "cpu/instruction_set.h"
#include "tensors.h"

namespace bertfast {

constexpr int PANEL = 32;  // rows of W, columns of y, that are packed together

enum class WeightType { float32, bfloat16, int8 };
enum class Epilogue { none, gelu, gelu_tanh };

// W [N, K] as operands [N / PANEL, K / E, PANEL], each of E = 1 fp32, 2 bf16 or 4 int8 values that are adjacent in a
// row of W. Rows and columns beyond W's are zero.
//
// With int8 W[n, k] / factors[k] ≈ scales[n] · q[n, k], |q| ≤ 127, and tokens are quantised as they are packed:
// x[t, k] · factors[k] ≈ s[t] · (u[t, k] - z[t]), where u and z are in 0 … 255, and s[t] is 1/254 of the range of
// x[t, k] · factors[k] over k, zero included: post-GELU activations, for one, are hardly ever negative.
struct PackedWeight {
  const void* operands;
  WeightType type;
  int64_t columns, depth;  // N, K
  const float* scales;     // int8: [N]
  const int32_t* sums;     // int8: [N], of each row of q
  const float* factors;    // int8: [K]; null: all are 1
};

struct PackedLinear {
  int64_t tokens;
  Rows x;  // [T, K]
  PackedWeight weight;
  Vector bias;  // [N]; may be absent
  Epilogue epilogue;
  Rows y;  // [T, N]
};

}  // namespace bertfast

BERTFAST_KERNEL(packed_linear, PackedLinear)
