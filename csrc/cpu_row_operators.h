// Operations on rows that have C++ kernels for CPUs only: gated_activation and pre_norm.
#pragma once
#include <tuple>

#include "gated_activation.h"
#include "operator_arguments.h"
#include "pre_norm.h"

namespace bertfast::operations {

static Activation activation_of(const std::string& name) {
  if (name == "silu") return Activation::silu;
  return name == "gelu_tanh" ? Activation::gelu_tanh : Activation::gelu;
}

static Tensor gated_activation_forward(Tensor x, OptionalTensor bias, std::string activation) {
  Cpu::check(x);
  x = in_rows(x);
  const int64_t tokens = x.size(0), columns = x.size(1) / 2;
  Tensor y = torch::stable::new_empty(x, {tokens, columns});
  bertfast::gated_activation_forward({tokens, columns, rows(x), Dense(bias), activation_of(activation), rows(y)});
  return y;
}

static std::tuple<Tensor, Tensor> gated_activation_backward(Tensor d_y, Tensor x, OptionalTensor bias,
                                                            std::string activation) {
  Cpu::check(x);
  d_y = in_rows(d_y), x = in_rows(x);
  const int64_t tokens = x.size(0), columns = x.size(1) / 2;
  Tensor d_x = torch::stable::new_empty(x, {tokens, 2 * columns});
  Tensor d_bias = new_floats(x, {bias ? 2 * columns : 0});
  bertfast::gated_activation_backward({tokens, columns, rows(d_y), rows(x), Dense(bias), activation_of(activation),
                                       rows(d_x), bias ? floats(d_bias) : nullptr});
  return {d_x, d_bias};
}

// The rows of a tensor that may be absent; `kept` keeps a contiguous copy alive.
static Rows optional_rows(const OptionalTensor& x, OptionalTensor& kept) {
  if (!x) return Rows{};
  Cpu::check(*x);
  kept = in_rows(*x);
  return rows(*kept);
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> pre_norm_forward(
    Tensor residual, OptionalTensor x, OptionalTensor bias, Tensor gamma, OptionalTensor beta, double eps, bool rms,
    ScalarType norm_dtype, OptionalTensor seed, OptionalTensor sequence_ids, OptionalTensor positions,
    int64_t counter_word, int64_t threshold) {
  Cpu::check(residual);
  residual = in_rows(residual);
  OptionalTensor kept;
  const Rows x_rows = optional_rows(x, kept);
  const int64_t tokens = residual.size(0), hidden = residual.size(1);
  Tensor stream = torch::stable::new_empty(residual, {x ? tokens : 0, x ? hidden : 0});
  Tensor normed = torch::stable::new_empty(residual, {tokens, hidden}, norm_dtype);
  Tensor mean = new_floats(residual, {rms ? 0 : tokens}), rstd = new_floats(residual, {tokens});
  Cpu::check(normed);
  bertfast::pre_norm_forward({tokens, hidden, x_rows, rows(residual), Dense(bias), Dense(gamma), Dense(beta),
                              (float)eps, rms, Mask(seed, sequence_ids, positions, counter_word, threshold),
                              rows(stream), rows(normed), floats(mean), floats(rstd)});
  return {stream, normed, mean, rstd};
}

static std::tuple<Tensor, Tensor, Tensor> pre_norm_backward(Tensor stream, OptionalTensor d_stream,
                                                            OptionalTensor d_normed, Tensor gamma, Tensor mean,
                                                            Tensor rstd, bool rms, bool has_bias,
                                                            std::optional<ScalarType> x_dtype, OptionalTensor seed,
                                                            OptionalTensor sequence_ids, OptionalTensor positions,
                                                            int64_t counter_word, int64_t threshold) {
  Cpu::check(stream);
  stream = in_rows(stream);
  OptionalTensor kept_stream, kept_normed;
  const Rows d_stream_rows = optional_rows(d_stream, kept_stream), d_normed_rows = optional_rows(d_normed, kept_normed);
  const int64_t tokens = stream.size(0), hidden = stream.size(1);
  const bool shared = !x_dtype || (!seed && *x_dtype == stream.scalar_type());
  Tensor d_x = torch::stable::new_empty(stream, {shared ? 0 : tokens, shared ? 0 : hidden},
                                        x_dtype.value_or(stream.scalar_type()));
  Tensor d_residual = torch::stable::new_empty(stream, {tokens, hidden}), sums = new_floats(stream, {3, hidden});
  bertfast::pre_norm_backward({tokens, hidden, d_stream_rows, d_normed_rows, rows(stream), Dense(gamma), floats(mean),
                               floats(rstd), rms, has_bias,
                               Mask(seed, sequence_ids, positions, counter_word, threshold),
                               shared ? Rows{} : rows(d_x), rows(d_residual), floats(sums)});
  return {d_x, d_residual, sums};
}

}  // namespace bertfast::operations
