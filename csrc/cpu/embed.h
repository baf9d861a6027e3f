// y = dropout(LN(z)), z = word[token] + token_type[type] + position[position], and its gradients.
#pragma once
#include "instruction_set.h"
#include "tensors.h"

namespace bertfast {

// What z of T tokens is gathered from; the tables are of one type.
struct Embeddings {
  Rows word, position, token_type;                                // [V or T, H], [positions, H], [types, H]
  const int64_t *token_ids, *position_ids, *token_type_ids;  // [T]; without token ids, word has a row a token
};

struct EmbedForward {
  int64_t tokens, hidden;
  Embeddings tables;
  Vector gamma, beta;  // [H]
  float eps;
  HiddenDropout dropout;
  Rows y;              // [T, H]
  float *mean, *rstd;  // [T], of z
};

struct EmbedBackward {
  int64_t tokens, hidden;
  Rows d_y;  // [T, H]
  Embeddings tables;
  Vector gamma;              // [H]
  const float *mean, *rstd;  // [T]
  HiddenDropout dropout;
  float* d_z;   // [T, H]
  float* sums;  // [2, H]: d_gamma and d_beta
};

// The gradient of a table of which rows were gathered: row i is the sum of the rows of d_z whose index is i.
struct SumByIndex {
  int64_t tokens, hidden, rows;
  const float* d_z;       // [T, H]
  const int64_t* index;   // [T], in 0 … rows - 1
  int64_t skipped;        // a row that gets zero; none: -1
  int64_t* order;         // [T], scratch
  int64_t* starts;        // [rows + 1], scratch
  Rows d_table;           // [rows, H]
};

}  // namespace bertfast

BERTFAST_KERNEL(embed_forward, EmbedForward)
BERTFAST_KERNEL(embed_backward, EmbedBackward)
BERTFAST_KERNEL(sum_by_index, SumByIndex)
