// o = dropout(softmax(q kᵀ · scale)) v within each sequence of a packed batch, and its gradients.
#pragma once
#include "cpu/instruction_set.h"
#include "tensors.h"

namespace bertfast {

constexpr int ATTENTION_BLOCK = 64;  // queries, and keys, of a block of scores: a multiple of 16

// A range of heads of one sequence, and the ranges of its queries and keys: all of both, or part of one in a long
// sequence.
struct AttentionTask {
  int64_t start;  // the sequence's first token
  int sequence, length;
  int first_head, end_head;
  int q_begin, q_end;
  int kv_begin, kv_end;

  bool all_queries() const { return q_end - q_begin == length; }
  bool all_keys() const { return kv_end - kv_begin == length; }
};

struct AttentionDropout {
  const uint64_t* seed;
  const int64_t* sequence_ids;  // [S]
  uint32_t counter_word;
  int threshold;  // of 256; 0: no dropout
};

struct AttentionInputs {
  int64_t capacity;  // T, padding slots included
  int heads, head_dim;
  int sequences, max_seqlen_bound;  // no sequence is longer than the bound
  const int32_t* cu_seqlens;        // [sequences + 1]
  // GPU only, [sequences + 1, 4]: sequence, first token, length and 0, the longest first; null: as in the batch.
  const int32_t* table;
  const void* qkv;  // [T, 3, A, D]
  Type type;        // of every tensor except the statistics
  int64_t stride;   // elements from one token of qkv to the next
  float scale;
  bool causal;
  int window;
  AttentionDropout dropout;
  // CPU only: the tasks in the order in which threads take them, and the number of slots that hold a token.
  const AttentionTask* tasks;
  int64_t task_count, num_tokens;
};

struct AttentionForward : AttentionInputs {
  void* o;  // [T, A, D]
  // [A, T], log2 of the mean of exp(score) over the sequence: close to 0, where the log of the sum would lose digits.
  float* lse;
};

struct AttentionBackward : AttentionInputs {
  const void *d_o, *o;  // [T, A, D]
  const float* lse;
  void* d_qkv;   // [T, 3, A, D]
  float* delta;  // [A, T], GPU only: scratch for the row sums of d_o · o
};

}  // namespace bertfast

BERTFAST_KERNEL(attention_forward, AttentionForward)
BERTFAST_KERNEL(attention_backward, AttentionBackward)
