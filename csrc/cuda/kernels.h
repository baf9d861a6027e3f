// The kernels of csrc/cuda, as library.cpp calls them: launches on a stream of PyTorch's. What they throw says why.
#pragma once
#include "../add_layer_norm.h"
#include "../attention.h"
#include "../bias_gelu.h"
#include "../cross_entropy.h"
#include "../gelu_layer_norm.h"

namespace bertfast::cuda {

// In how many parts a backward pass sums up over so many rows.
int layer_norm_parts(int64_t rows, int64_t columns);
int bias_gelu_parts(int64_t rows, int64_t columns);

void add_layer_norm_forward(const AddLayerNormForward&, void* stream);
void add_layer_norm_backward(const AddLayerNormBackward&, void* stream);
void attention_forward(const AttentionForward&, void* stream);
void attention_backward(const AttentionBackward&, void* stream);
void bias_gelu_forward(const BiasGeluForward&, void* stream);
void bias_gelu_backward(const BiasGeluBackward&, void* stream);
void cross_entropy(const CrossEntropy&, void* stream);
void gelu_layer_norm_forward(const GeluLayerNormForward&, void* stream);
void gelu_layer_norm_backward(const GeluLayerNormBackward&, void* stream);

}  // namespace bertfast::cuda
