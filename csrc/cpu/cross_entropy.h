// Softmax and loss of rows of logits, of which the gradient takes their place.
#pragma once
#include "instruction_set.h"
#include "tensors.h"

namespace bertfast {

struct CrossEntropy {
  int64_t rows, vocabulary;
  Rows logits;            // [R, V], without the bias; if `gradient`, what is left there is the loss's gradient for them
  Vector bias;            // [V]
  const int64_t* labels;  // [R]; a negative one makes its row inert
  float* losses;          // [R]
  bool* correct;          // [R]: the label's logit is the largest, and the first of such
  bool gradient;
  float* d_bias;  // [V], if `gradient`
};

}  // namespace bertfast

BERTFAST_KERNEL(cross_entropy, CrossEntropy)
