// The kernels of csrc/cuda: each function launches on a PyTorch stream and throws std::runtime_error with the reason.
//
// All are weak symbols: a file that this nvcc cannot compile is left out of the library, and its functions are null.
#pragma once
#include "../add_layer_norm.h"
#include "../attention.h"
#include "../bias_gelu.h"
#include "../cross_entropy.h"
#include "../gelu_layer_norm.h"

#define MAY_BE_MISSING __attribute__((weak))

namespace bertfast::cuda {

// The number of partial sums of a backward pass over [rows, columns].
MAY_BE_MISSING int add_layer_norm_parts(int64_t rows, int64_t columns);
MAY_BE_MISSING int bias_gelu_parts(int64_t rows, int64_t columns);
MAY_BE_MISSING int gelu_layer_norm_parts(int64_t rows, int64_t columns);

MAY_BE_MISSING void add_layer_norm_forward(const AddLayerNormForward&, void* stream);
MAY_BE_MISSING void add_layer_norm_backward(const AddLayerNormBackward&, void* stream);
MAY_BE_MISSING void attention_forward(const AttentionForward&, void* stream);
MAY_BE_MISSING void attention_backward(const AttentionBackward&, void* stream);
MAY_BE_MISSING void bias_gelu_forward(const BiasGeluForward&, void* stream);
MAY_BE_MISSING void bias_gelu_backward(const BiasGeluBackward&, void* stream);
MAY_BE_MISSING void cross_entropy(const CrossEntropy&, void* stream);
MAY_BE_MISSING void gelu_layer_norm_forward(const GeluLayerNormForward&, void* stream);
MAY_BE_MISSING void gelu_layer_norm_backward(const GeluLayerNormBackward&, void* stream);

}  // namespace bertfast::cuda

#undef MAY_BE_MISSING
