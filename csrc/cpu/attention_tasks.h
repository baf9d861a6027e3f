// How attention's work is cut, so that one long and many short sequences both keep all threads busy.
#pragma once
#include <vector>

#include "attention.h"

namespace bertfast {

// Longest first. A sequence is one task a head; where that is too much for one thread, several, whose results have the
// same bits.
std::vector<AttentionTask> attention_tasks(const int32_t* cu_seqlens, int64_t sequences, int64_t heads, int threads,
                                           bool backward);

}  // namespace bertfast
