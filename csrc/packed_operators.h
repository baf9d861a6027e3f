// Inference with packed weights, on CPUs: one linear layer, or all of a post-norm transformer layer.
#pragma once
#include <algorithm>
#include <string>

#include "add_layer_norm.h"
#include "attention_operators.h"
#include "cpu/shrinking_scratch.h"
#include "operator_arguments.h"
#include "packed_linear.h"

namespace bertfast::operations {

// A packed weight and its parameters, kept alive for the duration of the call; what is absent is an empty tensor.
class Packed {
 public:
  Packed(const Tensor* tensors, int64_t columns, int64_t depth)
      : operands_(tensors[0]), scales_(tensors[1]), sums_(tensors[2]), factors_(tensors[3]), bias_(tensors[4]) {
    weight_ = {operands_.data_ptr(), type(), columns, depth, nullptr, nullptr, nullptr};
    if (scales_.numel()) weight_.scales = floats(scales_);
    if (sums_.numel()) weight_.sums = static_cast<const int32_t*>(sums_.data_ptr());
    if (factors_.numel()) weight_.factors = floats(factors_);
  }
  // y = epilogue(x Wᵀ + bias), or without the bias.
  void operator()(const Rows& x, int64_t tokens, Epilogue epilogue, const Rows& y, bool adds_bias = true) const {
    packed_linear({tokens, x, weight_, adds_bias ? bias() : Vector{}, epilogue, y});
  }
  bool is_float32() const { return weight_.type == WeightType::float32; }
  Vector bias() const { return bias_.numel() ? Vector{bias_.data_ptr(), type_of(bias_)} : Vector{}; }

  static constexpr int TENSORS = 5;

 private:
  WeightType type() const {
    switch (operands_.scalar_type()) {
      case ScalarType::Float: return WeightType::float32;
      case ScalarType::BFloat16: return WeightType::bfloat16;
      default: return WeightType::int8;
    }
  }
  Tensor operands_, scales_, sums_, factors_, bias_;
  PackedWeight weight_{};
};

static Epilogue epilogue_of(const std::string& name) {
  if (name == "gelu") return Epilogue::gelu;
  return name == "gelu_tanh" ? Epilogue::gelu_tanh : Epilogue::none;
}

static Tensor packed_linear_forward(Tensor x, std::vector<Tensor> weight, int64_t columns, std::string activation,
                                    ScalarType dtype) {
  Cpu::check(x);
  x = in_rows(x);
  Tensor y = torch::stable::new_empty(x, {x.size(0), columns}, dtype);
  Packed(weight.data(), columns, x.size(1))(rows(x), x.size(0), epilogue_of(activation), rows(y));
  return y;
}

// Matrices of a call's intermediate results, in memory that is kept for the next call.
class Intermediates {
 public:
  Intermediates(std::initializer_list<int64_t> bytes) {
    thread_local BERTFAST_SET::ShrinkingScratch memory;
    int64_t total = 0;
    for (int64_t size : bytes) starts_[count_++] = total, total += (size + 63) / 64 * 64;
    memory_ = memory.reserve<char>(total);
  }
  Rows rows(int index, Type type, int64_t columns) const { return {memory_ + starts_[index], type, columns}; }
  float* floats(int index) const { return (float*)(memory_ + starts_[index]); }

 private:
  char* memory_;
  int64_t starts_[8];
  int count_ = 0;
};

static int64_t size_of(Type type) { return type == Type::float32 ? 4 : 2; }

// Copy the rows at `indices` to `to`.
static void gather(const Rows& from, const int64_t* indices, int64_t count, int64_t columns, const Rows& to) {
  const int64_t width = columns * size_of(from.type), stride = from.stride * size_of(from.type);
  for (int64_t i = 0; i < count; ++i)
    std::memcpy((char*)to.data + i * width, (const char*)from.data + indices[i] * stride, width);
}

// The options of a post-norm transformer layer.
struct LayerOptions {
  int64_t heads, head_dim, intermediate;
  float scale, epsilons[2];
  bool causal;
  int window;
  Epilogue activation;
  Type attention;  // in which attention is computed
};

// A post-norm layer (Vaswani et al., 2017) of T tokens; all that follows attention is computed for R rows alone.
class PackedLayer {
 public:
  PackedLayer(const Tensor& hidden, const std::vector<Tensor>& weights, const std::vector<Tensor>& norms,
              const LayerOptions& options)
      : hidden_(hidden),
        options_(options),
        columns_(options.heads * options.head_dim),
        qkv_(weight(weights, 0), 3 * columns_, hidden.size(1)),
        dense_(weight(weights, 1), hidden.size(1), columns_),
        intermediate_(weight(weights, 2), options.intermediate, hidden.size(1)),
        output_(weight(weights, 3), hidden.size(1), options.intermediate),
        attention_gamma_(norms[0]),
        attention_beta_(norms[1]),
        output_gamma_(norms[2]),
        output_beta_(norms[3]) {}

  void operator()(const Tensor& cu_seqlens, const OptionalTensor& kept, const Tensor& y) const {
    const int64_t tokens = hidden_.size(0), count = y.size(0), width = y.size(1), most = std::max(tokens, count);
    const Type stream = type_of(hidden_), attention = options_.attention;
    // Activations are rounded where the next GEMM would round them.
    const Type inner = intermediate_.is_float32() ? Type::float32 : Type::bfloat16;
    const Intermediates memory({3 * tokens * columns_ * size_of(attention), tokens * columns_ * size_of(attention),
                                options_.heads * tokens * 4, count * width * 4, count * width * size_of(stream),
                                count * options_.intermediate * size_of(inner), 2 * most * 4,
                                kept ? count * (columns_ * size_of(attention) + width * size_of(stream)) : 0});
    const Rows qkv = memory.rows(0, attention, 3 * columns_);
    Rows context = memory.rows(1, attention, columns_), residual = rows(hidden_);
    const Rows projected = memory.rows(3, Type::float32, width), middle = memory.rows(4, stream, width);
    const Rows activated = memory.rows(5, inner, options_.intermediate);
    float* const statistics = memory.floats(6);
    qkv_(residual, tokens, Epilogue::none, qkv);
    attend(qkv, Offsets(cu_seqlens), cu_seqlens.size(0) - 1, context.data, memory.floats(2));
    if (kept) {
      const Indices indices(kept);
      Rows at_rows = memory.rows(7, attention, columns_);
      gather(context, indices, count, columns_, at_rows), context = at_rows;
      at_rows = {(char*)at_rows.data + count * columns_ * size_of(attention), stream, width};
      gather(residual, indices, count, width, at_rows), residual = at_rows;
    }
    dense_(context, count, Epilogue::none, projected, false);
    add_layer_norm_forward({count,
                            width,
                            projected,
                            residual,
                            dense_.bias(),
                            attention_gamma_,
                            attention_beta_,
                            options_.epsilons[0],
                            {},
                            middle,
                            {},
                            statistics,
                            statistics + most});
    intermediate_(middle, count, options_.activation, activated);
    output_(activated, count, Epilogue::none, projected, false);
    add_layer_norm_forward({count,
                            width,
                            projected,
                            middle,
                            output_.bias(),
                            output_gamma_,
                            output_beta_,
                            options_.epsilons[1],
                            {},
                            rows(y),
                            {},
                            statistics,
                            statistics + most});
  }

 private:
  static const Tensor* weight(const std::vector<Tensor>& weights, int index) {
    return weights.data() + index * Packed::TENSORS;
  }

  void attend(const Rows& qkv, const int32_t* starts, int64_t sequences, void* context, float* lse) const {
    AttentionForward a{};
    a.capacity = hidden_.size(0), a.heads = (int)options_.heads, a.head_dim = (int)options_.head_dim;
    a.sequences = (int)sequences, a.cu_seqlens = starts, a.num_tokens = starts[sequences];
    a.qkv = qkv.data, a.type = qkv.type, a.stride = qkv.stride;
    a.scale = options_.scale, a.causal = options_.causal, a.window = options_.window;
    const auto tasks = attention_tasks(starts, a.sequences, a.heads, a.window, threads(), false);
    a.tasks = tasks.data(), a.task_count = (int64_t)tasks.size(), a.o = context, a.lse = lse;
    attention_forward(a);
  }

  const Tensor& hidden_;
  const LayerOptions& options_;
  int64_t columns_;  // of all heads
  Packed qkv_, dense_, intermediate_, output_;
  Dense attention_gamma_, attention_beta_, output_gamma_, output_beta_;
};

static Tensor packed_layer_forward(Tensor hidden, Tensor cu_seqlens, std::vector<Tensor> weights,
                                   std::vector<Tensor> norms, std::vector<double> epsilons, int64_t heads,
                                   int64_t head_dimension, int64_t intermediate, double scale, bool causal,
                                   std::optional<int64_t> window, std::string activation, ScalarType attention_dtype,
                                   OptionalTensor kept_rows) {
  Cpu::check(hidden);
  hidden = in_rows(hidden);
  const LayerOptions options{heads,
                             head_dimension,
                             intermediate,
                             (float)scale,
                             {(float)epsilons[0], (float)epsilons[1]},
                             causal,
                             (int)std::min<int64_t>(window.value_or(NO_WINDOW), NO_WINDOW),
                             epilogue_of(activation),
                             attention_dtype == ScalarType::Float ? Type::float32 : Type::bfloat16};
  Tensor y = torch::stable::new_empty(hidden, {kept_rows ? kept_rows->size(0) : hidden.size(0), hidden.size(1)});
  PackedLayer(hidden, weights, norms, options)(cu_seqlens, kept_rows, y);
  return y;
}

}  // namespace bertfast::operations
