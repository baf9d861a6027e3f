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
// With int8 W[n, k] ≈ scales[n] · q[n, k], |q| ≤ 127, and tokens are quantised as they are packed: x[t, k] · factors[k]
// ≈ s[t] · (u[t, k] - 128), where u is in 1 … 255 and s[t] = max over k of |x[t, k] · factors[k]| / 127.
struct PackedWeight {
  const void* operands;
  WeightType type;
  int64_t columns, depth;  // N, K
  const float* scales;     // int8: [N]
  const int32_t* offsets;  // int8: [N], 128 times the sum of each row of q
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
