// Prefetching of the rows that attention packs. A head's rows lie a token's stride apart, too far for the CPU's own
// prefetching, and a burst of prefetches waits as long as the loads would. Hence they are spread over the matmuls of
// the head before.
#pragma once
#include "attention_block.h"

namespace bertfast::BERTFAST_SET {

// Rows of tensors [tokens, D] that will be read or written soon, prefetched into L2 a few at a time.
template <class T, int D>
class RowPrefetch {
 public:
  // Add `count` rows of each of `parts` parts, which are part_stride elements apart.
  void add(const void* first, int64_t stride, int count, int parts = 1, int64_t part_stride = 0) {
    for (int part = 0; part < parts && count > 0; ++part) {
      streams_[stream_count_++] = {(const T*)first + part * part_stride, stride, count};
      rows_ += count;
    }
  }

  // Make `calls` calls of next() prefetch `share` of all rows.
  void pace(double share, int calls) { rows_per_call_ = (int)(rows_ * share / (calls > 0 ? calls : 1)) + 1; }

  // Prefetch the next rows. A function of its own, because it is called after every tile of every matmul.
  [[gnu::noinline]] void next() {
    for (int i = 0; i < rows_per_call_ && stream_ < stream_count_; ++i) {
      const Stream& stream = streams_[stream_];
      const char* const row = (const char*)(stream.first + row_ * stream.stride);
      UNROLL_FOR (int byte = 0; byte < D * (int)sizeof(T); byte += 64) __builtin_prefetch(row + byte, 0, 2);
      if (++row_ == stream.count) row_ = 0, ++stream_;
    }
  }

 private:
  struct Stream {
    const T* first;
    int64_t stride;
    int count;
  };
  Stream streams_[8];
  int stream_count_ = 0, rows_ = 0, rows_per_call_ = 0;
  int stream_ = 0, row_ = 0;  // the next row
};

// Call f(task, head, next_task, next_head) for the heads of all tasks. The last two are what the thread most probably
// processes next, since threads take turns; next_task is null at the end.
template <class F>
static void for_each_head(const AttentionInputs& a, const F& f) {
  for_each(a.task_count, [&](int64_t index) {
    const AttentionTask& task = a.tasks[index];
    const int64_t next_index = index + threads();
    const AttentionTask* const next = next_index < a.task_count ? &a.tasks[next_index] : nullptr;
    for (int head = task.first_head; head + 1 < task.end_head; ++head) f(task, head, &task, head + 1);
    f(task, task.end_head - 1, next, next == nullptr ? 0 : next->first_head);
  });
}

}  // namespace bertfast::BERTFAST_SET
