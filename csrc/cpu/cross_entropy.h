// The loss of a chunk of logits, and the logits' gradient in their place.
#pragma once
#include "instruction_set.h"
#include "tensors.h"

namespace bertfast {

struct CrossEntropy {
  int64_t rows, vocabulary;
  Rows logits;            // [R, V], without the bias; where a gradient is wanted, it takes their place
  Vector bias;            // [V]
  const int64_t* labels;  // [R]; negative: the row has none, and may hold anything
  double* loss;           // to which the rows' losses are added
  int64_t* correct;       // to which is added how many rows' label is the first of the largest logits
  float* d_bias;          // [V], to which the gradient's columns are added; null: no gradient is wanted
};

}  // namespace bertfast

BERTFAST_KERNEL(cross_entropy, CrossEntropy)
