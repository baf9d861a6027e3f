// o = dropout(softmax(q kᵀ · scale)) v within each sequence of a packed batch, and its gradients.
#pragma once
#include "cpu/instruction_set.h"
#include "tensors.h"

namespace bertfast {

constexpr int ATTENTION_BLOCK = 64;  // queries, and keys, that are worked on at a time: a multiple of 16

// Some heads of a sequence, and which of its queries and keys: all, or in a long one a part of either.
struct AttentionTask {
  int64_t start;  // the sequence's first token
  int sequence, length;
  int first_head, end_head;
  int first_query, end_query;
  int first_key, end_key;

  bool all_queries() const { return end_query - first_query == length; }
  bool all_keys() const { return end_key - first_key == length; }
};

struct AttentionDropout {
  const uint64_t* seed;
  const int64_t* number;  // [S], the sequences'
  uint32_t word;
  int threshold;  // 0: nothing is dropped
};

struct AttentionInputs {
  int64_t tokens;
  int heads, head_dimension;
  int sequences, longest;     // longest: no sequence has more tokens
  const int64_t* cu_seqlens;  // [sequences + 1]
  const void* qkv;  // [T, 3, A, D]
  Type type;        // of all but the statistics
  int64_t stride;   // elements from a token of qkv to the next
  float scale;
  bool causal;
  int window;
  AttentionDropout dropout;
  // On a CPU alone: the work as the threads take it, and how many tokens belong to a sequence.
  const AttentionTask* tasks;
  int64_t task_count, used;
};

struct AttentionForward : AttentionInputs {
  void* o;     // [T, A, D]
  // [A, T], log2 of the mean over the sequence of 2 to the scores · log2(e): near 0, where a sum's would lose digits.
  float* lse;
};

struct AttentionBackward : AttentionInputs {
  const void *d_o, *o;  // [T, A, D]
  const float* lse;
  void* d_qkv;   // [T, 3, A, D]
  float* delta;  // [A, T], on a GPU: room for the sums of d_o · o
};

}  // namespace bertfast

BERTFAST_KERNEL(attention_forward, AttentionForward)
BERTFAST_KERNEL(attention_backward, AttentionBackward)
