// From the arguments of an operation to the pointers that kernels take; devices, and launches on them.
//
// Written against LibTorch's stable ABI only, so that one build serves all later versions of PyTorch. `bertfast/ops`
// has checked shapes and devices; only what the kernels require beyond that is checked here.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(BERTFAST_CUDA)
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

#include <optional>
#include <string>
#include <vector>

#include "cpu/instruction_set.h"
#include "cuda/kernels.h"
#include "tensors.h"

namespace bertfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The device that kernels run on. An operation is written once for both.
struct Cpu {
  static constexpr bool on_gpu = false;

  static void check(const Tensor& x) {
    STD_TORCH_CHECK(x.scalar_type() != ScalarType::Half, "the CPU kernels take float32 and bfloat16");
  }
};

#if defined(BERTFAST_CUDA)
struct Cuda {
  static constexpr bool on_gpu = true;

  // Call f(PyTorch's current stream on x's device); an error names the operation and the shape of x.
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
  // The function is in libtorch_cuda, which a PyTorch without CUDA lacks, so it is looked up at run time.
  static void* stream(int32_t device) {
    using Get = AOTITorchError (*)(int32_t, void**);
    static const Get get = [] {
      void* const library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
      return library ? (Get)dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    }();
    void* found = nullptr;
    if (get == nullptr || get(device, &found) != 0)
      throw std::runtime_error("this build of PyTorch has no CUDA stream: install a PyTorch built with CUDA");
    return found;
  }
#endif
};
#endif

// Run a kernel of the operation's device, for tensors on the device of `like`.
#define RUN(kernel, like, ...)                                                                           \
  do {                                                                                                   \
    if constexpr (Device::on_gpu)                                                                        \
      Device::launch(#kernel, like, [&](void* stream) { bertfast::cuda::kernel(__VA_ARGS__, stream); }); \
    else Device::check(like), bertfast::kernel(__VA_ARGS__);                                             \
  } while (false)

namespace operations {

static Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Type::float32;
    case ScalarType::BFloat16: return Type::bfloat16;
    case ScalarType::Half: return Type::float16;
    default: STD_TORCH_CHECK(false, "the kernels support float32, bfloat16 and, on a GPU, float16");
  }
}

// Return x if its rows are contiguous, else a contiguous copy.
static Tensor in_rows(const Tensor& x) { return x.stride(1) == 1 || x.size(1) <= 1 ? x : torch::stable::contiguous(x); }

static Rows rows(const Tensor& x) { return {x.data_ptr(), type_of(x), x.stride(0)}; }

// A contiguous vector, kept alive for the duration of the call.
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

// A contiguous vector of integers, a copy if it has another type, kept alive for the duration of the call.
template <class Integer>
class Integers {
 public:
  explicit Integers(const OptionalTensor& x) {
    if (x) tensor_ = torch::stable::to(torch::stable::contiguous(*x), TYPE);
  }
  operator const Integer*() const { return tensor_ ? static_cast<const Integer*>(tensor_->data_ptr()) : nullptr; }

 private:
  static constexpr ScalarType TYPE = sizeof(Integer) == 4 ? ScalarType::Int : ScalarType::Long;
  OptionalTensor tensor_;
};

using Indices = Integers<int64_t>;
using Offsets = Integers<int32_t>;  // of the sequences in a packed batch

// The dropout arguments of an operation, as the kernels support them.
class Mask {
 public:
  Mask(const OptionalTensor& seed, const OptionalTensor& sequence_ids, const OptionalTensor& positions,
       int64_t counter_word, int64_t threshold)
      : sequence_ids_(sequence_ids), positions_(positions) {
    if (seed)
      dropout_ = {static_cast<const uint64_t*>(seed->data_ptr()), sequence_ids_, positions_, (uint32_t)counter_word,
                  (int)threshold};
  }
  operator HiddenDropout() const { return dropout_; }

 private:
  Indices sequence_ids_, positions_;
  HiddenDropout dropout_{};
};

static Tensor new_floats(const Tensor& like, std::initializer_list<int64_t> shape) {
  return torch::stable::new_empty(like, shape, ScalarType::Float);
}

static float* floats(const Tensor& x) { return static_cast<float*>(x.data_ptr()); }

// Sums over the rows of x, of `shape`; on a GPU [parts, *shape], one part per block. `count` returns the number of
// parts.
template <class Device>
class Sums {
 public:
  template <class Count>
  Sums(const Tensor& x, std::initializer_list<int64_t> shape, [[maybe_unused]] Count count) {
    std::vector<int64_t> partial_shape = shape;
    if constexpr (Device::on_gpu) {
      Device::launch("parts", x, [&](void*) { parts_ = count(x.size(0), x.size(1)); });
      partial_shape.insert(partial_shape.begin(), parts_);
    }
    sums_ = torch::stable::new_empty(x, partial_shape, ScalarType::Float);
  }
  operator float*() const { return floats(sums_); }
  int parts() const { return parts_; }

  // The sum over parts, which PyTorch adds in a fixed order.
  Tensor total() const {
    const int64_t first = 0;
    return Device::on_gpu ? torch::stable::sum(sums_, torch::headeronly::IntHeaderOnlyArrayRef(&first, 1)) : sums_;
  }

 private:
  int parts_ = 1;
  Tensor sums_;
};

// The number of parts of a GPU kernel's sums. Generic, so that CPU code, which never calls it, does not reference it.
#define PARTS(operation) [](auto rows, auto columns) { return bertfast::cuda::operation##_parts(rows, columns); }

}  // namespace operations
}  // namespace bertfast
