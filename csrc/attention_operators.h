// Attention of packed sequences, forward and backward.
#pragma once
#include <algorithm>
#include <tuple>
#include <vector>

#include "attention.h"
#include "cpu/attention_tasks.h"
#include "cpu/parallel.h"
#include "operator_arguments.h"

namespace bertfast::operations {

constexpr int64_t NO_WINDOW = 1 << 30;  // a window that masks nothing

// Return x contiguous, and on a GPU aligned to 16 bytes, as TMA and 16-byte accesses require.
template <class Device>
static Tensor dense(const Tensor& x) {
  Tensor result = torch::stable::contiguous(x);
  const bool moves = Device::on_gpu && (uintptr_t)result.data_ptr() % 16 != 0;
  return moves ? torch::stable::clone(result) : result;
}

// Return qkv if each token's elements are contiguous, and on a GPU if TMA can address them, else a contiguous copy.
template <class Device>
static Tensor in_tokens(const Tensor& qkv) {
  const int64_t heads = qkv.size(2), head_dim = qkv.size(3);
  bool dense_layout = qkv.stride(3) == 1 && qkv.stride(2) == head_dim && qkv.stride(1) == heads * head_dim;
  if (Device::on_gpu) dense_layout = dense_layout && (uintptr_t)qkv.data_ptr() % 16 == 0 && qkv.stride(0) * 2 % 16 == 0;
  return dense_layout ? qkv : dense<Device>(qkv);
}

// The inputs of both passes of attention, kept alive for the duration of the call.
template <class Device>
class AttentionCall {
 public:
  AttentionCall(const Tensor& qkv, const Tensor& cu_seqlens, const Tensor& sequence_ids, const OptionalTensor& table,
                int64_t max_seqlen_bound, double scale, bool causal, std::optional<int64_t> window,
                const OptionalTensor& seed, int64_t counter_word, int64_t threshold, bool backward)
      : qkv_(in_tokens<Device>(qkv)), starts_(cu_seqlens), table_(table), sequence_ids_(sequence_ids) {
    inputs_.capacity = qkv.size(0), inputs_.heads = (int)qkv.size(2), inputs_.head_dim = (int)qkv.size(3);
    inputs_.sequences = (int)cu_seqlens.size(0) - 1, inputs_.max_seqlen_bound = (int)max_seqlen_bound,
    inputs_.cu_seqlens = starts_, inputs_.table = table_;
    inputs_.qkv = qkv_.data_ptr(), inputs_.type = type_of(qkv_), inputs_.stride = qkv_.stride(0);
    inputs_.scale = (float)scale, inputs_.causal = causal;
    inputs_.window = (int)std::min<int64_t>(window.value_or(NO_WINDOW), NO_WINDOW);
    if (seed)
      inputs_.dropout = {static_cast<const uint64_t*>(seed->data_ptr()), sequence_ids_, (uint32_t)counter_word,
                         (int)threshold};
    if constexpr (!Device::on_gpu) {
      const int32_t* const starts = inputs_.cu_seqlens;
      inputs_.num_tokens = starts[inputs_.sequences];
      tasks_ = attention_tasks(starts, inputs_.sequences, inputs_.heads, inputs_.window, threads(), backward);
      inputs_.tasks = tasks_.data(), inputs_.task_count = (int64_t)tasks_.size();
    }
  }
  operator const AttentionInputs&() const { return inputs_; }

 private:
  Tensor qkv_;
  Offsets starts_, table_;
  Indices sequence_ids_;
  std::vector<AttentionTask> tasks_;
  AttentionInputs inputs_{};
};

template <class Device>
static std::tuple<Tensor, Tensor> attention_forward(Tensor qkv, Tensor cu_seqlens, Tensor sequence_ids,
                                                    OptionalTensor tile_table, int64_t max_seqlen_bound, double scale,
                                                    bool causal, std::optional<int64_t> window, OptionalTensor seed,
                                                    int64_t counter_word, int64_t threshold) {
  const AttentionCall<Device> call(qkv, cu_seqlens, sequence_ids, tile_table, max_seqlen_bound, scale, causal, window,
                                   seed, counter_word, threshold, false);
  Tensor o = torch::stable::new_empty(qkv, {qkv.size(0), qkv.size(2), qkv.size(3)});
  Tensor lse = new_floats(qkv, {qkv.size(2), qkv.size(0)});
  RUN(attention_forward, qkv, AttentionForward{call, o.data_ptr(), floats(lse)});
  return {o, lse};
}

template <class Device>
static Tensor attention_backward(Tensor d_o, Tensor qkv, Tensor o, Tensor lse, Tensor cu_seqlens, Tensor sequence_ids,
                                 OptionalTensor tile_table, int64_t max_seqlen_bound, double scale, bool causal,
                                 std::optional<int64_t> window, OptionalTensor seed, int64_t counter_word,
                                 int64_t threshold) {
  const AttentionCall<Device> call(qkv, cu_seqlens, sequence_ids, tile_table, max_seqlen_bound, scale, causal, window,
                                   seed, counter_word, threshold, true);
  d_o = dense<Device>(d_o), o = dense<Device>(o);
  Tensor d_qkv = torch::stable::new_empty(qkv, {qkv.size(0), 3, qkv.size(2), qkv.size(3)});
  Tensor delta = new_floats(qkv, {Device::on_gpu ? qkv.size(2) : 0, qkv.size(0)});
  RUN(attention_backward, qkv,
      AttentionBackward{call, d_o.data_ptr(), o.data_ptr(), floats(lse), d_qkv.data_ptr(), floats(delta)});
  return d_qkv;
}

}  // namespace bertfast::operations
