// Work runs on PyTorch's own threads: a second pool would compete with its workers, which spin between operations.
#pragma once
#include <cstdint>

namespace bertfast {

using Part = void (*)(int64_t first, int64_t end, void* context);

int threads();
void run_parts(int64_t count, int64_t grain, Part part, void* context);  // in library.cpp

namespace BERTFAST_SET {

// Call f(first, end) for ranges that cover 0 … count - 1, each at least `grain` long. Results must not depend on the
// split.
template <class F>
static inline void parallel(int64_t count, int64_t grain, const F& f) {
  const Part part = [](int64_t first, int64_t end, void* context) { (*static_cast<const F*>(context))(first, end); };
  if (count > 0) run_parts(count, grain, part, const_cast<F*>(&f));
}

// Call f(task) for each of 0 … count - 1, scheduled dynamically: for tasks of unequal length.
template <class F>
static inline void for_each(int64_t count, const F& f) {
  int64_t next = 0;
  const int64_t workers = threads() < count ? threads() : count;
  parallel(workers, 1, [&](int64_t first, int64_t end) {
    for (int64_t worker = first; worker < end; ++worker)
      for (int64_t task; (task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < count;) f(task);
  });
}

}  // namespace BERTFAST_SET
}  // namespace bertfast
