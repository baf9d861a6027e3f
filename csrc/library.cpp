// The native library `bertfast._C`: registration of its operations with PyTorch.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "attention_operators.h"
#include "cpu/parallel.h"
#include "cpu_row_operators.h"
#include "embeddings_operators.h"
#include "packed_operators.h"
#include "rotary_operators.h"
#include "row_operators.h"

namespace bertfast {

int threads() { return (int)torch::stable::get_num_threads(); }

void run_parts(int64_t count, int64_t grain, Part part, void* context) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t first, int64_t end) { part(first, end, context); });
}

namespace operations {

static int64_t instruction_set_in_use() { return (int64_t)instruction_set(); }

static bool has_instruction_set(int64_t set) { return is_supported((InstructionSet)set); }

static bool quad_instruction_in_use() { return has_quad_instruction(); }

static bool tiles_in_use() { return has_tiles(); }

static void use_instruction_set(int64_t set) {
  STD_TORCH_CHECK(has_instruction_set(set), "this CPU does not support that instruction set");
  use((InstructionSet)set);
}

}  // namespace operations
}  // namespace bertfast

// The schemas of all other operations are the contracts of kernels/contracts.py, which bertfast/ops/native.py defines
// before it loads this library.
STABLE_TORCH_LIBRARY_FRAGMENT(bertfast, library) {
  library.def("instruction_set() -> int");
  library.def("has_instruction_set(int set) -> bool");
  library.def("use_instruction_set(int set) -> ()");
  library.def("has_quad_instruction() -> bool");
  library.def("use_quad_instruction(bool allowed) -> ()");
  library.def("has_tiles() -> bool");
  library.def("use_tiles(bool? use) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bertfast, CompositeExplicitAutograd, library) {
  library.impl("instruction_set", TORCH_BOX(&bertfast::operations::instruction_set_in_use));
  library.impl("has_instruction_set", TORCH_BOX(&bertfast::operations::has_instruction_set));
  library.impl("use_instruction_set", TORCH_BOX(&bertfast::operations::use_instruction_set));
  library.impl("has_quad_instruction", TORCH_BOX(&bertfast::operations::quad_instruction_in_use));
  library.impl("use_quad_instruction", TORCH_BOX(&bertfast::use_quad_instruction));
  library.impl("has_tiles", TORCH_BOX(&bertfast::operations::tiles_in_use));
  library.impl("use_tiles", TORCH_BOX(&bertfast::use_tiles));
}

// Operations that are written once for both kinds of device.
namespace bertfast::operations {

template <class Device>
static void implement(auto& library, const std::string& device) {
  const auto implement = [&](const char* name, auto function) { library.impl((device + name).c_str(), function); };
// On a GPU only if the kernel's file was compiled: otherwise its functions are null, see cuda/kernels.h.
#define IMPLEMENT(name)                                                   \
  if constexpr (Device::on_gpu) {                                         \
    if (bertfast::cuda::name) implement(#name, TORCH_BOX(&name<Device>)); \
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
  library.impl("cpu_embeddings_forward", TORCH_BOX(&bertfast::operations::embeddings_forward));
  library.impl("cpu_embeddings_backward", TORCH_BOX(&bertfast::operations::embeddings_backward));
  library.impl("cpu_gated_activation_forward", TORCH_BOX(&bertfast::operations::gated_activation_forward));
  library.impl("cpu_gated_activation_backward", TORCH_BOX(&bertfast::operations::gated_activation_backward));
  library.impl("cpu_gather_backward", TORCH_BOX(&bertfast::operations::gather_backward));
  library.impl("cpu_packed_layer_forward", TORCH_BOX(&bertfast::operations::packed_layer_forward));
  library.impl("cpu_packed_linear_forward", TORCH_BOX(&bertfast::operations::packed_linear_forward));
  library.impl("cpu_pre_norm_forward", TORCH_BOX(&bertfast::operations::pre_norm_forward));
  library.impl("cpu_pre_norm_backward", TORCH_BOX(&bertfast::operations::pre_norm_backward));
  library.impl("cpu_rotary_forward", TORCH_BOX(&bertfast::operations::rotary_forward));
  library.impl("cpu_rotary_backward", TORCH_BOX(&bertfast::operations::rotary_backward));
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

// Importing the module registers the operations; it has no other content.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
