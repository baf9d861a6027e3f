// The compiled library `bertfast._C`: the step from tensors to the kernels' pointers.
//
// Written on LibTorch's stable ABI alone, so that one build serves all later versions of PyTorch. `bertfast/ops` has
// checked shapes and devices; here is checked what only the kernels ask for.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(BERTFAST_CUDA)
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "add_layer_norm.h"
#include "bias_gelu.h"
#include "cpu/attention_tasks.h"
#include "cpu/instruction_set.h"
#include "cpu/parallel.h"
#include "cross_entropy.h"
#include "cuda/kernels.h"
#include "embed.h"
#include "gelu_layer_norm.h"

namespace bertfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

int threads() { return (int)torch::stable::get_num_threads(); }

void run_parts(int64_t count, int64_t grain, Part part, void* context) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t first, int64_t end) { part(first, end, context); });
}

// Where kernels run. An operation is written once for both.
struct Cpu {
  static constexpr bool on_gpu = false;

  static void check(const Tensor& x) {
    STD_TORCH_CHECK(x.scalar_type() != ScalarType::Half, "the kernels for a CPU take float32 and bfloat16");
  }
};

#if defined(BERTFAST_CUDA)
struct Cuda {
  static constexpr bool on_gpu = true;

  // f(the stream that PyTorch uses on x's device); what goes wrong is told with the operation's name and x's shape.
  template <class F>
  static void launch(const char* name, const Tensor& x, const F& f) {
    try {
#if defined(BERTFAST_EMULATED_CUDA)
      f(nullptr);
#else
      const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
      f(stream(x.get_device_index()));
#endif
    } catch (const std::exception& error) {
      std::string shape;
      for (int64_t i = 0; i < x.dim(); ++i) shape += (i ? ", " : "") + std::to_string(x.size(i));
      STD_TORCH_CHECK(false, "cuda_", name, " of a tensor [", shape, "]: ", error.what());
    }
  }

#if !defined(BERTFAST_EMULATED_CUDA)
 private:
  // libtorch_cuda has it, which a PyTorch without CUDA lacks, so the loader is asked.
  static void* stream(int32_t device) {
    using Get = AOTITorchError (*)(int32_t, void**);
    static const Get get = [] {
      void* const library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
      return library ? (Get)dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    }();
    void* found = nullptr;
    if (get == nullptr || get(device, &found) != 0) throw std::runtime_error("this PyTorch gives no CUDA stream");
    return found;
  }
#endif
};
#endif

// Runs a kernel of the operation's device, for tensors that are where `like` is.
#define RUN(kernel, like, ...)                                                                                \
  do {                                                                                                        \
    if constexpr (Device::on_gpu)                                                                             \
      Device::launch(#kernel, like, [&](void* stream) { bertfast::cuda::kernel(__VA_ARGS__, stream); });      \
    else Device::check(like), bertfast::kernel(__VA_ARGS__);                                                  \
  } while (false)

namespace operations {

static Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Type::float32;
    case ScalarType::BFloat16: return Type::bfloat16;
    case ScalarType::Half: return Type::float16;
    default: STD_TORCH_CHECK(false, "the kernels take float32, bfloat16 and, on a GPU, float16");
  }
}

// The tensor itself if each row's elements are adjacent, else a copy of which they are.
static Tensor in_rows(const Tensor& x) {
  return x.stride(1) == 1 || x.size(1) <= 1 ? x : torch::stable::contiguous(x);
}

static Rows rows(const Tensor& x) { return {x.data_ptr(), type_of(x), x.stride(0)}; }

// A vector without gaps, kept as long as the call lasts.
class Dense {
 public:
  explicit Dense(const Tensor& x) : tensor_(torch::stable::contiguous(x)) {}
  explicit Dense(const OptionalTensor& x) {
    if (x) tensor_ = torch::stable::contiguous(*x);
  }
  operator Vector() const { return tensor_ ? Vector{tensor_->data_ptr(), type_of(*tensor_)} : Vector{}; }

 private:
  OptionalTensor tensor_;
};

class Indices {
 public:
  explicit Indices(const OptionalTensor& x) {
    if (x) tensor_ = torch::stable::to(torch::stable::contiguous(*x), ScalarType::Long);
  }
  operator const int64_t*() const { return tensor_ ? static_cast<const int64_t*>(tensor_->data_ptr()) : nullptr; }

 private:
  OptionalTensor tensor_;
};

// What a launcher is told of dropout, as the kernels take it.
class Mask {
 public:
  Mask(const OptionalTensor& seed, const OptionalTensor& number, const OptionalTensor& position, int64_t word,
       int64_t threshold)
      : number_(number), position_(position) {
    if (seed)
      dropout_ = {static_cast<const uint64_t*>(seed->data_ptr()), number_, position_, (uint32_t)word, (int)threshold};
  }
  operator HiddenDropout() const { return dropout_; }

 private:
  Indices number_, position_;
  HiddenDropout dropout_{};
};

static Tensor new_floats(const Tensor& like, std::initializer_list<int64_t> shape) {
  return torch::stable::new_empty(like, shape, ScalarType::Float);
}

static float* floats(const Tensor& x) { return static_cast<float*>(x.data_ptr()); }

// Sums over rows, of `shape`, in parts that each block of a GPU has its own of; `count` says how many of x's rows.
template <class Device>
class Sums {
 public:
  template <class Count>
  Sums(const Tensor& x, std::initializer_list<int64_t> shape, [[maybe_unused]] Count count) {
    std::vector<int64_t> of_parts = shape;
    if constexpr (Device::on_gpu) {
      Device::launch("parts", x, [&](void*) { parts_ = count(x.size(0), x.size(1)); });
      of_parts.insert(of_parts.begin(), parts_);
    }
    sums_ = torch::stable::new_empty(x, of_parts, ScalarType::Float);
  }
  operator float*() const { return floats(sums_); }
  int parts() const { return parts_; }

  // PyTorch adds them up, in the same order every time.
  Tensor total() const {
    const int64_t first = 0;
    return Device::on_gpu ? torch::stable::sum(sums_, torch::headeronly::IntHeaderOnlyArrayRef(&first, 1)) : sums_;
  }

 private:
  int parts_ = 1;
  Tensor sums_;
};

// How many parts a GPU's kernel sums in. Generic, so that the CPU's code, which never calls it, does not refer to it.
#define PARTS(operation) [](auto rows, auto columns) { return bertfast::cuda::operation##_parts(rows, columns); }

// The dtype of a copy that a kernel writes, or reads the gradient of.
template <class Device>
static void check_copy(ScalarType dtype) {
  const bool half = Device::on_gpu && dtype == ScalarType::Half;
  STD_TORCH_CHECK(half || dtype == ScalarType::BFloat16, "add_layer_norm writes its copy in bfloat16",
                  Device::on_gpu ? " or float16" : "");
}

template <class Device>
static std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_forward(
    Tensor x, Tensor residual, OptionalTensor bias, Tensor gamma, Tensor beta, double eps, OptionalTensor seed,
    OptionalTensor number, OptionalTensor position, int64_t word, int64_t threshold,
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
                          Mask(seed, number, position, word, threshold), rows(y), copy_dtype ? rows(copy) : Rows{},
                          floats(mean), floats(rstd)});
  return {y, mean, rstd, copy};
}

template <class Device>
static std::tuple<Tensor, Tensor, Tensor> add_layer_norm_backward(
    Tensor d_y, Tensor x, Tensor residual, OptionalTensor bias, Tensor gamma, Tensor mean, Tensor rstd,
    OptionalTensor seed, OptionalTensor number, OptionalTensor position, int64_t word, int64_t threshold,
    OptionalTensor d_copy) {
  d_y = in_rows(d_y), x = in_rows(x), residual = in_rows(residual);
  // A gradient of another type than y's is that of the copy, which comes alone.
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
                           Mask(seed, number, position, word, threshold), shared ? Rows{} : rows(d_x), rows(d_residual),
                           sums, sums.parts()});
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
static std::tuple<Tensor, Tensor, Tensor> gelu_layer_norm_forward(Tensor x, Tensor bias, Tensor gamma, Tensor beta,
                                                                  double eps) {
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
static std::tuple<Tensor, Tensor> gelu_layer_norm_backward(Tensor d_y, Tensor x, Tensor bias, Tensor gamma, Tensor mean,
                                                           Tensor rstd) {
  d_y = in_rows(d_y), x = in_rows(x);
  const int64_t count = x.size(0), hidden = x.size(1);
  Tensor d_x = torch::stable::new_empty(x, {count, hidden});
  const Sums<Device> sums(x, {3, hidden}, PARTS(gelu_layer_norm));
  RUN(gelu_layer_norm_backward, x,
      GeluLayerNormBackward{count, hidden, rows(d_y), rows(x), Dense(bias), Dense(gamma), floats(mean), floats(rstd),
                            rows(d_x), sums, sums.parts()});
  return {d_x, sums.total()};
}

// The public operator `embed` turns this error into an IndexError.
static void check_within(const char* name, const int64_t* indices, int64_t count, int64_t rows) {
  for (int64_t i = 0; i < count; ++i)
    STD_TORCH_CHECK(indices[i] >= 0 && indices[i] < rows, name, "[", i, "] is ", indices[i], ", but its table has ",
                    rows, " rows: it must be in 0 … ", rows - 1);
}

static std::tuple<Tensor, Tensor, Tensor> embed_forward(
    Tensor word, Tensor position, Tensor token_type, OptionalTensor token_ids, Tensor token_type_ids,
    Tensor position_ids, Tensor gamma, Tensor beta, double eps, OptionalTensor seed, OptionalTensor number,
    OptionalTensor place, int64_t dropout_word, int64_t threshold) {
  word = in_rows(word), position = in_rows(position), token_type = in_rows(token_type);
  const int64_t tokens = token_type_ids.size(0), hidden = word.size(1);
  const Indices words(token_ids), positions(position_ids), types(token_type_ids);
  if (token_ids) check_within("embed: token_ids", words, tokens, word.size(0));
  check_within("embed: position_ids", positions, tokens, position.size(0));
  check_within("embed: token_type_ids", types, tokens, token_type.size(0));
  Tensor y = torch::stable::new_empty(word, {tokens, hidden});
  Tensor mean = new_floats(word, {tokens}), rstd = new_floats(word, {tokens});
  bertfast::embed_forward(
      {{tokens, hidden, rows(word), rows(position), rows(token_type), words, positions, types}, Dense(gamma),
       Dense(beta), (float)eps, Mask(seed, number, place, dropout_word, threshold), rows(y), floats(mean),
       floats(rstd)});
  return {y, mean, rstd};
}

static Tensor sum_by_index(const Tensor& values, const int64_t* index, const Tensor& table, int64_t left_out = -1) {
  const int64_t count = values.size(0), hidden = values.size(1), number = table.size(0);
  Tensor sums = torch::stable::new_empty(table, {number, hidden});
  bertfast::sum_by_index({count, number, hidden, rows(values), index, left_out, rows(sums)});
  return sums;
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> embed_backward(
    Tensor d_y, Tensor word, Tensor position, Tensor token_type, OptionalTensor token_ids, Tensor token_type_ids,
    Tensor position_ids, Tensor gamma, Tensor mean, Tensor rstd, std::optional<int64_t> padding_index,
    OptionalTensor seed, OptionalTensor number, OptionalTensor place, int64_t dropout_word, int64_t threshold) {
  d_y = in_rows(d_y), word = in_rows(word), position = in_rows(position), token_type = in_rows(token_type);
  const int64_t tokens = d_y.size(0), hidden = d_y.size(1);
  const Indices words(token_ids), positions(position_ids), types(token_type_ids);
  // As autograd has it: in the dtype of the sum of the three, which is fp32 where one of them is.
  const bool alike = type_of(word) == type_of(position) && type_of(word) == type_of(token_type);
  Tensor d_z = alike ? torch::stable::new_empty(word, {tokens, hidden}) : new_floats(word, {tokens, hidden});
  Tensor sums = new_floats(word, {2, hidden});
  bertfast::embed_backward(
      {{tokens, hidden, rows(word), rows(position), rows(token_type), words, positions, types}, rows(d_y), Dense(gamma),
       floats(mean), floats(rstd), Mask(seed, number, place, dropout_word, threshold), rows(d_z), floats(sums)});
  int64_t left_out = padding_index.value_or(-1);
  if (padding_index && left_out < 0) left_out += word.size(0);
  Tensor d_word = token_ids ? sum_by_index(d_z, words, word, left_out) : torch::stable::to(d_z, word.scalar_type());
  return {d_word, sum_by_index(d_z, positions, position), sum_by_index(d_z, types, token_type), sums};
}

// The gradient [tokens, H] of x for each d_y [R, H] of y = x[index].
static std::vector<Tensor> gather_backward(Tensor index, std::vector<Tensor> d_ys, int64_t tokens) {
  const Indices named(index);
  check_within("gather: rows", named, index.size(0), tokens);
  std::vector<Tensor> sums;
  for (const Tensor& d_y : d_ys) {
    const Tensor values = in_rows(d_y);
    sums.push_back(torch::stable::new_empty(values, {tokens, values.size(1)}));
    bertfast::sum_by_index(
        {values.size(0), tokens, values.size(1), rows(values), named, -1, rows(sums.back())});
  }
  return sums;
}

// Without gaps, and on a GPU from a multiple of 16 bytes on, where TMA and accesses of 16 bytes find it.
template <class Device>
static Tensor dense(const Tensor& x) {
  Tensor result = torch::stable::contiguous(x);
  const bool moves = Device::on_gpu && (uintptr_t)result.data_ptr() % 16 != 0;
  return moves ? torch::stable::clone(result) : result;
}

// The tensor itself if each token's elements are adjacent, and on a GPU where TMA finds them, else a copy.
template <class Device>
static Tensor in_tokens(const Tensor& qkv) {
  const int64_t heads = qkv.size(2), dimension = qkv.size(3);
  bool adjacent = qkv.stride(3) == 1 && qkv.stride(2) == dimension && qkv.stride(1) == heads * dimension;
  if (Device::on_gpu) adjacent = adjacent && (uintptr_t)qkv.data_ptr() % 16 == 0 && qkv.stride(0) * 2 % 16 == 0;
  return adjacent ? qkv : dense<Device>(qkv);
}

// What both passes of attention are told, kept as long as the call lasts.
template <class Device>
class AttentionCall {
 public:
  AttentionCall(const Tensor& qkv, const Tensor& cu_seqlens, const Tensor& numbers, int64_t longest, double scale,
                bool causal, std::optional<int64_t> window, const OptionalTensor& seed, int64_t word, int64_t threshold,
                bool backward)
      : qkv_(in_tokens<Device>(qkv)), starts_(cu_seqlens), numbers_(numbers) {
    inputs_.tokens = qkv.size(0), inputs_.heads = (int)qkv.size(2), inputs_.head_dimension = (int)qkv.size(3);
    inputs_.sequences = (int)cu_seqlens.size(0) - 1, inputs_.longest = (int)longest, inputs_.cu_seqlens = starts_;
    inputs_.qkv = qkv_.data_ptr(), inputs_.type = type_of(qkv_), inputs_.stride = qkv_.stride(0);
    inputs_.scale = (float)scale, inputs_.causal = causal;
    inputs_.window = (int)std::min<int64_t>(window.value_or(EVERYWHERE), EVERYWHERE);
    if (seed)
      inputs_.dropout = {static_cast<const uint64_t*>(seed->data_ptr()), numbers_, (uint32_t)word, (int)threshold};
    if constexpr (!Device::on_gpu) {
      const int64_t* const starts = inputs_.cu_seqlens;
      inputs_.used = starts[inputs_.sequences];
      tasks_ = attention_tasks(starts, inputs_.sequences, inputs_.heads, inputs_.window, threads(), backward);
      inputs_.tasks = tasks_.data(), inputs_.task_count = (int64_t)tasks_.size();
    }
  }
  operator const AttentionInputs&() const { return inputs_; }

 private:
  static constexpr int64_t EVERYWHERE = 1 << 30;  // a window that hides nothing
  Tensor qkv_;
  Indices starts_, numbers_;
  std::vector<AttentionTask> tasks_;
  AttentionInputs inputs_{};
};

template <class Device>
static std::tuple<Tensor, Tensor> attention_forward(Tensor qkv, Tensor cu_seqlens, Tensor numbers,
                                                    OptionalTensor /*tile_table*/, int64_t longest, double scale,
                                                    bool causal, std::optional<int64_t> window, OptionalTensor seed,
                                                    int64_t word, int64_t threshold) {
  const AttentionCall<Device> call(qkv, cu_seqlens, numbers, longest, scale, causal, window, seed, word, threshold,
                                   false);
  Tensor o = torch::stable::new_empty(qkv, {qkv.size(0), qkv.size(2), qkv.size(3)});
  Tensor lse = new_floats(qkv, {qkv.size(2), qkv.size(0)});
  RUN(attention_forward, qkv, AttentionForward{call, o.data_ptr(), floats(lse)});
  return {o, lse};
}

template <class Device>
static Tensor attention_backward(Tensor d_o, Tensor qkv, Tensor o, Tensor lse, Tensor cu_seqlens, Tensor numbers,
                                 OptionalTensor /*tile_table*/, int64_t longest, double scale, bool causal,
                                 std::optional<int64_t> window, OptionalTensor seed, int64_t word, int64_t threshold) {
  const AttentionCall<Device> call(qkv, cu_seqlens, numbers, longest, scale, causal, window, seed, word, threshold,
                                   true);
  d_o = dense<Device>(d_o), o = dense<Device>(o);
  Tensor d_qkv = torch::stable::new_empty(qkv, {qkv.size(0), 3, qkv.size(2), qkv.size(3)});
  Tensor delta = new_floats(qkv, {Device::on_gpu ? qkv.size(2) : 0, qkv.size(0)});
  RUN(attention_backward, qkv,
      AttentionBackward{call, d_o.data_ptr(), o.data_ptr(), floats(lse), d_qkv.data_ptr(), floats(delta)});
  return d_qkv;
}

// What `linear_cross_entropy` does with a chunk of logits between its products; see bertfast/ops/linear_cross_entropy_native.py.
template <class Device>
static void cross_entropy(Tensor logits, Tensor bias, Tensor labels, Tensor losses, Tensor correct, Tensor d_bias) {
  const int64_t count = logits.size(0), vocabulary = logits.size(1);
  STD_TORCH_CHECK(vocabulary <= 1 || logits.stride(1) == 1, "each row's logits must be adjacent");
  if (Device::on_gpu) bias = torch::stable::to(bias, ScalarType::Float);
  Tensor softmax = new_floats(logits, {Device::on_gpu ? count : 0, 2});
  RUN(cross_entropy, logits,
      CrossEntropy{count, vocabulary, rows(logits), Dense(bias), Indices(labels), floats(losses),
                   static_cast<int64_t*>(correct.data_ptr()), d_bias.numel() > 0 ? floats(d_bias) : nullptr,
                   floats(softmax)});
}

static int64_t instruction_set_in_use() { return (int64_t)instruction_set(); }

static bool has_instruction_set(int64_t set) { return is_supported((InstructionSet)set); }

static void use_instruction_set(int64_t set) {
  STD_TORCH_CHECK(has_instruction_set(set), "this processor lacks that instruction set");
  use((InstructionSet)set);
}

}  // namespace operations
}  // namespace bertfast

// The schemas of all other operations are those of kernels/contracts.py, defined by bertfast/ops/native.py before this
// library is loaded.
STABLE_TORCH_LIBRARY_FRAGMENT(bertfast, library) {
  library.def("instruction_set() -> int");
  library.def("has_instruction_set(int set) -> bool");
  library.def("use_instruction_set(int set) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bertfast, CompositeExplicitAutograd, library) {
  library.impl("instruction_set", TORCH_BOX(&bertfast::operations::instruction_set_in_use));
  library.impl("has_instruction_set", TORCH_BOX(&bertfast::operations::has_instruction_set));
  library.impl("use_instruction_set", TORCH_BOX(&bertfast::operations::use_instruction_set));
}

// The operations that are written once for both kinds of device.
namespace bertfast::operations {

template <class Device>
static void implement(auto& library, const std::string& device) {
  const auto implement = [&](const char* name, auto function) { library.impl((device + name).c_str(), function); };
// On a GPU only where the kernel's file compiled: its functions are null otherwise, see cuda/kernels.h.
#define IMPLEMENT(name)                                                        \
  if constexpr (Device::on_gpu) {                                              \
    if (bertfast::cuda::name) implement(#name, TORCH_BOX(&name<Device>));      \
  } else implement(#name, TORCH_BOX(&name<Device>))
  IMPLEMENT(add_layer_norm_forward);
  IMPLEMENT(add_layer_norm_backward);
  IMPLEMENT(attention_forward);
  IMPLEMENT(attention_backward);
  IMPLEMENT(bias_gelu_forward);
  IMPLEMENT(bias_gelu_backward);
  IMPLEMENT(cross_entropy);
  IMPLEMENT(gelu_layer_norm_forward);
  IMPLEMENT(gelu_layer_norm_backward);
#undef IMPLEMENT
}

}  // namespace bertfast::operations

STABLE_TORCH_LIBRARY_IMPL(bertfast, CPU, library) {
  bertfast::operations::implement<bertfast::Cpu>(library, "cpu_");
  library.impl("cpu_embed_forward", TORCH_BOX(&bertfast::operations::embed_forward));
  library.impl("cpu_embed_backward", TORCH_BOX(&bertfast::operations::embed_backward));
  library.impl("cpu_gather_backward", TORCH_BOX(&bertfast::operations::gather_backward));
}

#if defined(BERTFAST_CUDA)
#if defined(BERTFAST_EMULATED_CUDA)
STABLE_TORCH_LIBRARY_IMPL(bertfast, CPU, cuda) {
#else
STABLE_TORCH_LIBRARY_IMPL(bertfast, CUDA, cuda) {
#endif
  bertfast::operations::implement<bertfast::Cuda>(cuda, "cuda_");
}
#endif

// Importing the module is what registers the operations; it holds nothing else.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
