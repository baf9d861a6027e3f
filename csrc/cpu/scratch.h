// Thread-local memory that is kept between calls: page faults of fresh memory cost more than the writes.
#pragma once
#include <cstdint>
#include <cstdlib>

namespace bertfast::BERTFAST_SET {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { release(); }

  // Return uninitialised memory for `count` elements, aligned to 64 bytes.
  template <class T>
  T* reserve(int64_t count) {
    const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    if (bytes > size_) {
      release();
      size_ = bytes;
      memory_ = std::aligned_alloc(64, bytes);
      if (memory_ == nullptr) std::abort();
    }
    return static_cast<T*>(memory_);
  }

  // Bytes that are kept.
  size_t size() const { return size_; }

  void release() {
    std::free(memory_);
    memory_ = nullptr, size_ = 0;
  }

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

}  // namespace bertfast::BERTFAST_SET
