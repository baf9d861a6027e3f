// A Scratch of the calling thread whose size depends on the batch, and that does not stay that of the largest batch.
#pragma once
#include "scratch.h"

namespace bertfast::BERTFAST_SET {

class ShrinkingScratch {
 public:
  // Return uninitialised memory for `count` elements, aligned to 64 bytes. After CALLS calls that needed less than a
  // quarter of a large one, what they do not need is given back.
  template <class T>
  T* reserve(int64_t count) {
    const size_t bytes = count * sizeof(T);
    if (bytes > recent_) recent_ = bytes;
    if (++calls_ == CALLS) {
      if (scratch_.size() > SMALL && scratch_.size() / 4 > recent_) scratch_.release();
      calls_ = 0, recent_ = 0;
    }
    return scratch_.reserve<T>(count);
  }

 private:
  static constexpr int CALLS = 256;           // of an operation: some calls of a model
  static constexpr size_t SMALL = 4UL << 20;  // bytes, below which nothing is given back
  Scratch scratch_;
  size_t recent_ = 0;  // most bytes of these calls
  int calls_ = 0;
};

}  // namespace bertfast::BERTFAST_SET
