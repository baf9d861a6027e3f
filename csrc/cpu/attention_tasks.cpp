#include "attention_tasks.h"

#include <algorithm>
#include <numeric>

namespace bertfast {

constexpr int32_t SHARE = 256;  // queries, or keys, of a part of a sequence: whole blocks of the kernels

std::vector<AttentionTask> attention_tasks(const int32_t* cu_seqlens, int64_t sequences, int64_t heads, int threads,
                                           bool backward) {
  const auto length = [&](int64_t sequence) { return cu_seqlens[sequence + 1] - cu_seqlens[sequence]; };
  std::vector<int32_t> order(sequences);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return length(a) > length(b); });
  double work = 0;
  for (int32_t sequence : order) work += (double)heads * length(sequence) * length(sequence);
  std::vector<AttentionTask> tasks;
  for (int32_t sequence : order) {
    const int32_t all = length(sequence);
    if (all == 0) break;
    const bool whole = all <= SHARE || 2.0 * threads * all * all <= work;
    for (int32_t head = 0; head < heads; ++head) {
      if (whole) {
        tasks.push_back({sequence, head, 0, all, 0, all, true, true});
        continue;
      }
      for (int32_t first = 0; first < all; first += SHARE) {
        const int32_t end = std::min(first + SHARE, all);
        tasks.push_back({sequence, head, first, end, 0, all, true, false});
        if (backward) tasks.push_back({sequence, head, 0, all, first, end, false, true});
      }
    }
  }
  return tasks;
}

}  // namespace bertfast
