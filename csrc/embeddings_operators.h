// Embeddings and the gradient of a gather, on a CPU.
#pragma once
#include <tuple>
#include <vector>

#include "embeddings.h"
#include "operator_arguments.h"

namespace bertfast::operations {

// The public operator `embeddings` turns this error into an IndexError.
static void check_within(const char* name, const int64_t* indices, int64_t count, int64_t rows) {
  for (int64_t i = 0; i < count; ++i)
    STD_TORCH_CHECK(indices[i] >= 0 && indices[i] < rows, name, "[", i, "] is ", indices[i], ", but its table has ",
                    rows, " rows: it must be in 0 … ", rows - 1);
}

static std::tuple<Tensor, Tensor, Tensor> embeddings_forward(Tensor word, Tensor position, Tensor token_type,
                                                             OptionalTensor token_ids, Tensor token_type_ids,
                                                             Tensor position_ids, Tensor gamma, OptionalTensor beta,
                                                             double eps, OptionalTensor seed,
                                                             OptionalTensor sequence_ids, OptionalTensor positions,
                                                             int64_t counter_word, int64_t threshold) {
  word = in_rows(word), position = in_rows(position), token_type = in_rows(token_type);
  const int64_t tokens = token_type_ids.size(0), hidden = word.size(1);
  const Indices token_rows(token_ids), position_rows(position_ids), type_rows(token_type_ids);
  if (token_ids) check_within("embeddings: token_ids", token_rows, tokens, word.size(0));
  check_within("embeddings: position_ids", position_rows, tokens, position.size(0));
  check_within("embeddings: token_type_ids", type_rows, tokens, token_type.size(0));
  Tensor y = torch::stable::new_empty(word, {tokens, hidden});
  Tensor mean = new_floats(word, {tokens}), rstd = new_floats(word, {tokens});
  bertfast::embeddings_forward(
      {{tokens, hidden, rows(word), rows(position), rows(token_type), token_rows, position_rows, type_rows},
       Dense(gamma),
       Dense(beta),
       (float)eps,
       Mask(seed, sequence_ids, positions, counter_word, threshold),
       rows(y),
       floats(mean),
       floats(rstd)});
  return {y, mean, rstd};
}

static Tensor sum_by_index(const Tensor& values, const int64_t* index, const Tensor& table, int64_t zero_row = -1) {
  const int64_t count = values.size(0), hidden = values.size(1), num_rows = table.size(0);
  Tensor sums = torch::stable::new_empty(table, {num_rows, hidden});
  bertfast::sum_by_index({count, num_rows, hidden, rows(values), index, zero_row, rows(sums)});
  return sums;
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> embeddings_backward(
    Tensor d_y, Tensor word, Tensor position, Tensor token_type, OptionalTensor token_ids, Tensor token_type_ids,
    Tensor position_ids, Tensor gamma, Tensor mean, Tensor rstd, std::optional<int64_t> padding_index,
    OptionalTensor seed, OptionalTensor sequence_ids, OptionalTensor positions, int64_t counter_word,
    int64_t threshold) {
  d_y = in_rows(d_y), word = in_rows(word), position = in_rows(position), token_type = in_rows(token_type);
  const int64_t tokens = d_y.size(0), hidden = d_y.size(1);
  const Indices token_rows(token_ids), position_rows(position_ids), type_rows(token_type_ids);
  // As in autograd: the dtype of the sum of the three embeddings, fp32 if any of them is.
  const bool same_type = type_of(word) == type_of(position) && type_of(word) == type_of(token_type);
  Tensor d_z = same_type ? torch::stable::new_empty(word, {tokens, hidden}) : new_floats(word, {tokens, hidden});
  Tensor sums = new_floats(word, {2, hidden});
  bertfast::embeddings_backward(
      {{tokens, hidden, rows(word), rows(position), rows(token_type), token_rows, position_rows, type_rows},
       rows(d_y),
       Dense(gamma),
       floats(mean),
       floats(rstd),
       Mask(seed, sequence_ids, positions, counter_word, threshold),
       rows(d_z),
       floats(sums)});
  // A negative padding index counts from the end, as in torch.nn.Embedding.
  int64_t zero_row = padding_index.value_or(-1);
  if (padding_index && zero_row < 0) zero_row += word.size(0);
  Tensor d_word =
      token_ids ? sum_by_index(d_z, token_rows, word, zero_row) : torch::stable::to(d_z, word.scalar_type());
  return {d_word, sum_by_index(d_z, position_rows, position), sum_by_index(d_z, type_rows, token_type), sums};
}

// The gradient [tokens, H] of x for each d_y [R, H] of y = x[index].
static std::vector<Tensor> gather_backward(Tensor index, std::vector<Tensor> d_ys, int64_t tokens) {
  const Indices source_rows(index);
  check_within("gather: rows", source_rows, index.size(0), tokens);
  std::vector<Tensor> sums;
  for (const Tensor& d_y : d_ys) {
    const Tensor values = in_rows(d_y);
    sums.push_back(torch::stable::new_empty(values, {tokens, values.size(1)}));
    bertfast::sum_by_index({values.size(0), tokens, values.size(1), rows(values), source_rows, -1, rows(sums.back())});
  }
  return sums;
}

}  // namespace bertfast::operations
