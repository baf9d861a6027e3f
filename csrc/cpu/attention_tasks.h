// How attention is split into tasks for the threads. Results are bitwise identical for every split.
#pragma once
#include <algorithm>
#include <vector>

#include "../attention.h"

namespace bertfast {

// Return the tasks, longest first, for threads that each take the next one. A task is several heads of a short
// sequence, or part of one head where a whole head would outlast the other threads' work.
inline std::vector<AttentionTask> attention_tasks(const int32_t* cu_seqlens, int sequences, int heads, int64_t window,
                                                  int threads, bool backward) {
  std::vector<AttentionTask> whole;
  for (int sequence = 0; sequence < sequences; ++sequence) {
    const int64_t start = cu_seqlens[sequence];
    const int length = (int)(cu_seqlens[sequence + 1] - start);
    if (length > 0) whole.push_back({start, sequence, length, 0, heads, 0, length, 0, length});
  }
  std::stable_sort(whole.begin(), whole.end(), [](const auto& a, const auto& b) { return a.length > b.length; });
  const auto work = [&](const AttentionTask& task) {  // scores of one head, computed or padded
    return (double)task.length * (std::min<double>(task.length, 2.0 * window) + ATTENTION_BLOCK);
  };
  double work_per_thread = 0;
  for (const AttentionTask& task : whole) work_per_thread += heads * work(task) / threads;

  // A part of the backward pass covers a range of queries or of keys, and both recompute the scores: 7 matmuls for 5.
  const double max_work = backward ? work_per_thread * 7 / 5 : work_per_thread / 4;
  std::vector<AttentionTask> tasks;
  for (const AttentionTask& task : whole) {
    const int heads_per_task = std::clamp((int)(work_per_thread / 32 / work(task)), 1, heads);
    const int blocks = (task.length + ATTENTION_BLOCK - 1) / ATTENTION_BLOCK;
    const bool split = threads > 1 && blocks > 2 && work(task) > max_work;
    const int split_blocks = split ? std::clamp((int)(blocks * work_per_thread / 16 / work(task)), 2, blocks) : blocks;
    const int size = ATTENTION_BLOCK * split_blocks;
    for (int head = 0; head < heads; head += heads_per_task) {
      AttentionTask part = task;
      part.first_head = head, part.end_head = std::min(head + heads_per_task, heads);
      for (int first = 0; first < task.length; first += size) {
        part.q_begin = first, part.q_end = std::min(first + size, task.length);
        tasks.push_back(part);
      }
      part.q_begin = 0, part.q_end = task.length;
      for (int first = 0; backward && split && first < task.length; first += size) {
        part.kv_begin = first, part.kv_end = std::min(first + size, task.length);
        tasks.push_back(part);
      }
    }
  }
  return tasks;
}

}  // namespace bertfast
