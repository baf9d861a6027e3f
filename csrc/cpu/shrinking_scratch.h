// A Scratch of the calling thread whose size depends on the batch, and that does not stay that of the largest batch.
#pragma once
#include <optional>

#include "scratch.h"

namespace bertfast::BERTFAST_SET {

class ShrinkingScratch {
 public:
  // Return uninitialised memory for `count` elements, aligned to 64 bytes. After CALLS calls that needed less than a
  // quarter of a large one, what they do not need is given back.
  template <class T>
  T* reserve(int64_t count) {
    const int64_t bytes = count * (int64_t)sizeof(T);
    if (bytes > size_) size_ = bytes;
    if (bytes > recent_) recent_ = bytes;
    if (++calls_ == CALLS) {
      if (size_ > SMALL && size_ / 4 > recent_) scratch_.emplace(), size_ = recent_;
      calls_ = 0, recent_ = 0;
    }
    if (!scratch_) scratch_.emplace();
    return scratch_->template reserve<T>(count);
  }

 private:
  static constexpr int CALLS = 256;            // of an operation: some calls of a model
  static constexpr int64_t SMALL = 4LL << 20;  // bytes, below which nothing is given back
  std::optional<Scratch> scratch_;
  int64_t size_ = 0, recent_ = 0;
  int calls_ = 0;
};

}  // namespace bertfast::BERTFAST_SET
