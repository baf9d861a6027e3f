// o = dropout(softmax(q kᵀ · scale)) v within each sequence of a packed batch, and its gradient.
#pragma once
#include "instruction_set.h"
#include "tensors.h"

namespace bertfast {

// A part of the work: the queries first_query … end_query - 1 of a sequence in one head, against the keys
// first_key … end_key - 1, in the backward pass for the gradient of the queries, of keys and values, or of all.
struct AttentionTask {
  int32_t sequence, head;
  int32_t first_query, end_query, first_key, end_key;
  bool of_queries, of_keys;
};

// What both passes are told.
struct AttentionInput {
  const void* qkv;  // [T, 3, A, D], tokens `stride` elements apart
  Type type;
  int64_t stride, tokens, heads, head_dimension, sequences;
  const int32_t* cu_seqlens;  // [S + 1]
  const int64_t* numbers;     // [S], the sequences' numbers in the run
  float scale;
  bool causal;
  int64_t window;  // as long as any sequence where there is none
  uint64_t seed;
  uint32_t word;
  int threshold;  // 0: nothing is dropped
  const AttentionTask* tasks;
  int64_t count;
};

struct AttentionForward {
  AttentionInput input;
  void* o;     // [T, A, D]
  float* lse;  // [A, T], log2 of the sum of 2 to the scores · log2(e)
};

struct AttentionBackward {
  AttentionInput input;
  const void *d_o, *o;  // [T, A, D]
  const float* lse;     // [A, T]
  void* d_qkv;          // [T, 3, A, D]
};

}  // namespace bertfast

BERTFAST_KERNEL(attention_forward, AttentionForward)
BERTFAST_KERNEL(attention_backward, AttentionBackward)
