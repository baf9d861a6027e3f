// Memory of a thread, kept between calls: fresh pages cost more than what is written to them.
#pragma once
#include <cstdint>
#include <cstdlib>

namespace bertfast::BERTFAST_SET {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

  // Room for `count` elements, aligned to 64 bytes, that holds anything.
  template <class T>
  T* room(int64_t count) {
    const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    if (bytes > size_) {
      std::free(memory_);
      size_ = bytes;
      memory_ = std::aligned_alloc(64, bytes);
      if (memory_ == nullptr) std::abort();
    }
    return static_cast<T*>(memory_);
  }

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

}  // namespace bertfast::BERTFAST_SET
