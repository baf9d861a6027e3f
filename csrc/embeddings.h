// y = dropout(LN(z)), z = word[token] + token_type[type] + position[position], and its gradients.
#pragma once
#include "cpu/instruction_set.h"
#include "tensors.h"

namespace bertfast {

// Indices have been checked to be within their tables.
struct Embeddings {
  int64_t tokens, hidden;
  Rows word, position, token_type;  // [V, H], or [T, H] if token_ids is null; [positions, H]; [types, H]
  const int64_t *token_ids, *position_ids, *token_type_ids;  // [T]; token_ids may be null
};

struct EmbeddingsForward {
  Embeddings from;
  Vector gamma, beta;  // [H]
  float eps;
  HiddenDropout dropout;
  Rows y;              // [T, H], of word's type
  float *mean, *rstd;  // [T], of z
};

struct EmbeddingsBackward {
  Embeddings from;
  Rows d_y;                  // [T, H], of word's type
  Vector gamma;              // [H]
  const float *mean, *rstd;  // [T]
  HiddenDropout dropout;
  Rows d_z;     // [T, H], of word's type or float32
  float* sums;  // [2, H]: d_gamma and d_beta
};

// The gradient of an embedding table: table[r] = sum of values[n] over all n with index[n] = r.
struct SumByIndex {
  int64_t count, rows, hidden;
  Rows values;           // [count, H]
  const int64_t* index;  // [count]
  int64_t zero_row;      // table row that is set to zero; -1: none
  Rows table;            // [rows, H]
};

}  // namespace bertfast

BERTFAST_KERNEL(embeddings_forward, EmbeddingsForward)
BERTFAST_KERNEL(embeddings_backward, EmbeddingsBackward)
BERTFAST_KERNEL(sum_by_index, SumByIndex)
