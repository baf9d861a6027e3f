// Operations on rows: add_layer_norm, bias_gelu, gelu_layer_norm, and the cross entropy of a chunk of logits.
#pragma once
#include <tuple>

#include "add_layer_norm.h"
#include "bias_gelu.h"
#include "cross_entropy.h"
#include "gelu_layer_norm.h"
#include "operator_arguments.h"

namespace bertfast::operations {

// Check the dtype of the 16-bit copy that add_layer_norm writes, or of its gradient.
template <class Device>
static void check_copy(ScalarType dtype) {
  const bool half = Device::on_gpu && dtype == ScalarType::Half;
  STD_TORCH_CHECK(half || dtype == ScalarType::BFloat16, "add_layer_norm writes its copy in bfloat16",
                  Device::on_gpu ? " or float16" : "");
}

template <class Device>
static std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_forward(
    Tensor x, Tensor residual, OptionalTensor bias, Tensor gamma, OptionalTensor beta, double eps, OptionalTensor seed,
    OptionalTensor sequence_ids, OptionalTensor positions, int64_t counter_word, int64_t threshold,
    std::optional<ScalarType> copy_dtype) {
  if (copy_dtype) check_copy<Device>(*copy_dtype);
  x = in_rows(x), residual = in_rows(residual);
  const int64_t tokens = x.size(0), hidden = x.size(1);
  Tensor y = torch::stable::new_empty(residual, {tokens, hidden});
  Tensor copy = copy_dtype ? torch::stable::new_empty(residual, {tokens, hidden}, *copy_dtype)
                           : torch::stable::new_empty(residual, {0, 0});
  Tensor mean = new_floats(x, {tokens}), rstd = new_floats(x, {tokens});
  RUN(add_layer_norm_forward, x,
      AddLayerNormForward{tokens, hidden, rows(x), rows(residual), Dense(bias), Dense(gamma), Dense(beta), (float)eps,
                          Mask(seed, sequence_ids, positions, counter_word, threshold), rows(y),
                          copy_dtype ? rows(copy) : Rows{}, floats(mean), floats(rstd)});
  return {y, mean, rstd, copy};
}

template <class Device>
static std::tuple<Tensor, Tensor, Tensor> add_layer_norm_backward(Tensor d_y, Tensor x, Tensor residual,
                                                                  OptionalTensor bias, Tensor gamma, Tensor mean,
                                                                  Tensor rstd, OptionalTensor seed,
                                                                  OptionalTensor sequence_ids, OptionalTensor positions,
                                                                  int64_t counter_word, int64_t threshold,
                                                                  OptionalTensor d_copy) {
  d_y = in_rows(d_y), x = in_rows(x), residual = in_rows(residual);
  // If only the copy has a gradient it is passed as d_y: its type differs from that of y.
  const bool copy_alone = !d_copy && d_y.scalar_type() != residual.scalar_type();
  if (d_copy) d_copy = in_rows(*d_copy);
  if (copy_alone) d_copy = d_y;
  if (d_copy) check_copy<Device>(d_copy->scalar_type());
  const int64_t tokens = x.size(0), hidden = x.size(1);
  const bool shared = !seed && x.scalar_type() == residual.scalar_type();
  Tensor d_x = shared ? torch::stable::new_empty(x, {0, 0}) : torch::stable::new_empty(x, {tokens, hidden});
  Tensor d_residual = torch::stable::new_empty(residual, {tokens, hidden});
  const Sums<Device> sums(x, {3, hidden}, PARTS(add_layer_norm));
  RUN(add_layer_norm_backward, x,
      AddLayerNormBackward{tokens, hidden, copy_alone ? Rows{} : rows(d_y), d_copy ? rows(*d_copy) : Rows{}, rows(x),
                           rows(residual), Dense(bias), Dense(gamma), floats(mean), floats(rstd),
                           Mask(seed, sequence_ids, positions, counter_word, threshold), shared ? Rows{} : rows(d_x),
                           rows(d_residual), sums, sums.parts()});
  return {d_x, d_residual, sums.total()};
}

template <class Device>
static Tensor bias_gelu_forward(Tensor x, Tensor bias, std::string approximate) {
  x = in_rows(x);
  const int64_t tokens = x.size(0), columns = x.size(1);
  Tensor y = torch::stable::new_empty(x, {tokens, columns});
  RUN(bias_gelu_forward, x, BiasGeluForward{tokens, columns, rows(x), Dense(bias), approximate == "tanh", rows(y)});
  return y;
}

template <class Device>
static std::tuple<Tensor, Tensor> bias_gelu_backward(Tensor d_y, Tensor x, Tensor bias, std::string approximate) {
  d_y = in_rows(d_y), x = in_rows(x);
  const int64_t tokens = x.size(0), columns = x.size(1);
  Tensor d_x = torch::stable::new_empty(x, {tokens, columns});
  const Sums<Device> d_bias(x, {columns}, PARTS(bias_gelu));
  RUN(bias_gelu_backward, x,
      BiasGeluBackward{tokens, columns, rows(d_y), rows(x), Dense(bias), approximate == "tanh", rows(d_x), d_bias,
                       d_bias.parts()});
  return {d_x, d_bias.total()};
}

template <class Device>
static std::tuple<Tensor, Tensor, Tensor> gelu_layer_norm_forward(Tensor x, OptionalTensor bias, Tensor gamma,
                                                                  OptionalTensor beta, double eps) {
  x = in_rows(x);
  const int64_t count = x.size(0), hidden = x.size(1);
  Tensor y = torch::stable::new_empty(gamma, {count, hidden});
  Tensor mean = new_floats(x, {count}), rstd = new_floats(x, {count});
  RUN(gelu_layer_norm_forward, x,
      GeluLayerNormForward{count, hidden, rows(x), Dense(bias), Dense(gamma), Dense(beta), (float)eps, rows(y),
                           floats(mean), floats(rstd)});
  return {y, mean, rstd};
}

template <class Device>
static std::tuple<Tensor, Tensor> gelu_layer_norm_backward(Tensor d_y, Tensor x, OptionalTensor bias, Tensor gamma,
                                                           Tensor mean, Tensor rstd) {
  d_y = in_rows(d_y), x = in_rows(x);
  const int64_t count = x.size(0), hidden = x.size(1);
  Tensor d_x = torch::stable::new_empty(x, {count, hidden});
  const Sums<Device> sums(x, {3, hidden}, PARTS(gelu_layer_norm));
  RUN(gelu_layer_norm_backward, x,
      GeluLayerNormBackward{count, hidden, rows(d_y), rows(x), Dense(bias), Dense(gamma), floats(mean), floats(rstd),
                            rows(d_x), sums, sums.parts()});
  return {d_x, sums.total()};
}

// Loss and gradient of one chunk of logits, between the GEMMs of bertfast/ops/linear_cross_entropy_native.py.
template <class Device>
static void cross_entropy(Tensor logits, Tensor bias, Tensor labels, Tensor losses, Tensor correct, Tensor d_bias) {
  const int64_t count = logits.size(0), vocab_size = logits.size(1);
  STD_TORCH_CHECK(vocab_size <= 1 || logits.stride(1) == 1, "each row's logits must be adjacent");
  if (Device::on_gpu) bias = torch::stable::to(bias, ScalarType::Float);
  Tensor softmax = new_floats(logits, {Device::on_gpu ? count : 0, 2});
  RUN(cross_entropy, logits,
      CrossEntropy{count, vocab_size, rows(logits), Dense(bias), Indices(labels), floats(losses),
                   static_cast<int64_t*>(correct.data_ptr()), d_bias.numel() > 0 ? floats(d_bias) : nullptr,
                   floats(softmax)});
}

}  // namespace bertfast::operations
