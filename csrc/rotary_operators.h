// Rotary position embedding, on a CPU.
#pragma once
#include "attention_operators.h"
#include "operator_arguments.h"
#include "rotary.h"

namespace bertfast::operations {

static Tensor rotate(const Tensor& qkv, const Tensor& angles, bool inverse) {
  Cpu::check(qkv);
  STD_TORCH_CHECK(type_of(angles) == Type::float32, "rotary: table must be float32");
  const Tensor x = in_tokens<Cpu>(qkv), table = in_rows(angles);
  const int64_t tokens = x.size(0), heads = x.size(2), head_dim = x.size(3);
  const Tensor y = torch::stable::new_empty(x, {tokens, 3, heads, head_dim});
  bertfast::rotary({tokens, heads, head_dim, rows(x), rows(table), inverse, rows(y)});
  return y;
}

static Tensor rotary_forward(Tensor qkv, Tensor table) { return rotate(qkv, table, false); }

static Tensor rotary_backward(Tensor d_y, Tensor table) { return rotate(d_y, table, true); }

}  // namespace bertfast::operations
