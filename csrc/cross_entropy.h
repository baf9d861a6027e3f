// The loss of a chunk of logits, and the logits' gradient in their place.
#pragma once
#include "cpu/instruction_set.h"
#include "tensors.h"

namespace bertfast {

struct CrossEntropy {
  int64_t rows, vocabulary;
  Rows logits;            // [R, V], without the bias; where a gradient is wanted, it takes their place
  Vector bias;            // [V]
  const int64_t* labels;  // [R]; negative: the row has none, and may hold anything
  float* losses;          // [R], 0 where there is no label
  int64_t* correct;       // [R], 1 where the label's is the first of the largest logits
  float* d_bias;          // [V], to which the gradient's columns are added; null: no gradient is wanted
  float* softmax;         // [R, 2], on a GPU: room for what is known of a row between the kernels
};

}  // namespace bertfast

BERTFAST_KERNEL(cross_entropy, CrossEntropy)
