// How attention's work is cut for the threads. What it computes has the same bits however it is cut.
#pragma once
#include <algorithm>
#include <vector>

#include "../attention.h"

namespace bertfast {

// The longest first, for threads that each take the next. Tasks are short against all the work: several heads where
// sequences are short, and parts where one head of a sequence would last longer than the others keep the threads busy.
inline std::vector<AttentionTask> attention_tasks(const int64_t* cu_seqlens, int sequences, int heads, int64_t window,
                                                  int threads, bool backward) {
  std::vector<AttentionTask> whole;
  for (int sequence = 0; sequence < sequences; ++sequence) {
    const int64_t start = cu_seqlens[sequence];
    const int length = (int)(cu_seqlens[sequence + 1] - start);
    if (length > 0) whole.push_back({start, sequence, length, 0, heads, 0, length, 0, length});
  }
  std::stable_sort(whole.begin(), whole.end(), [](const auto& a, const auto& b) { return a.length > b.length; });
  const auto work = [&](const AttentionTask& task) {  // of a head
    return (double)task.length * (std::min<double>(task.length, 2.0 * window) + ATTENTION_BLOCK);
  };
  double share = 0;  // of a thread
  for (const AttentionTask& task : whole) share += heads * work(task) / threads;

  // A part of the backward pass is either of the queries or of the keys, and both make the scores: 7 products for 5.
  const double longest = backward ? share * 7 / 5 : share / 4;
  std::vector<AttentionTask> tasks;
  for (const AttentionTask& task : whole) {
    const int together = std::clamp((int)(share / 32 / work(task)), 1, heads);
    const int blocks = (task.length + ATTENTION_BLOCK - 1) / ATTENTION_BLOCK;
    const bool split = threads > 1 && blocks > 2 && work(task) > longest;
    const int size = ATTENTION_BLOCK * (split ? std::clamp((int)(blocks * share / 16 / work(task)), 2, blocks) : blocks);
    for (int head = 0; head < heads; head += together) {
      AttentionTask part = task;
      part.first_head = head, part.end_head = std::min(head + together, heads);
      for (int first = 0; first < task.length; first += size) {
        part.first_query = first, part.end_query = std::min(first + size, task.length);
        tasks.push_back(part);
      }
      part.first_query = 0, part.end_query = task.length;
      for (int first = 0; backward && split && first < task.length; first += size) {
        part.first_key = first, part.end_key = std::min(first + size, task.length);
        tasks.push_back(part);
      }
    }
  }
  return tasks;
}

}  // namespace bertfast
