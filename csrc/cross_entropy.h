// Cross entropy of a chunk of logits, and the gradient of the logits in place.
#pragma once
#include "cpu/instruction_set.h"
#include "tensors.h"

namespace bertfast {

struct CrossEntropy {
  int64_t rows, vocab_size;
  Rows logits;            // [R, V], without the bias; overwritten by the gradient if d_bias is given
  Vector bias;            // [V]
  const int64_t* labels;  // [R]; negative: ignored, and the row may hold anything
  float* losses;          // [R], 0 for ignored rows
  int64_t* correct;       // [R], 1 if the label is the first argmax of the logits
  float* d_bias;          // [V], accumulates the column sums of the gradient; null: no gradient
  float* softmax;         // [R, 2], GPU only: scratch, row maximum and 1 / sum of exponentials
};

}  // namespace bertfast

BERTFAST_KERNEL(cross_entropy, CrossEntropy)
