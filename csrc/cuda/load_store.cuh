// Loads and stores of 8 adjacent elements of a row (16 bytes of a 16-bit type), as fp32 in registers.
#pragma once
#include "hopper.cuh"

namespace bertfast::cuda {

DEVICE float widen(float x) { return x; }

DEVICE float widen(Vector x, int64_t i) {
  switch (x.type) {
    case Type::float32: return ((const float*)x.data)[i];
    case Type::bfloat16: return widen(((const BFloat16*)x.data)[i]);
    default: return widen(((const Half*)x.data)[i]);
  }
}

DEVICE void store(float* p, float x) { *p = x; }
template <class T>
DEVICE void store(T* p, float x) {
  p->bits = (uint16_t)pack(T{}, x, 0.f);
}

DEVICE float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// 8 elements as they are in memory.
template <class T>
struct Eight {
  Words4 words[sizeof(T) / 2];
};

DEVICE void widen(const Eight<float>& from, float (&x)[8]) {
  UNROLL_FOR (int i = 0; i < 8; ++i) x[i] = from_bits(from.words[i / 4].word[i % 4]);
}
template <class T>
DEVICE void widen(const Eight<T>& from, float (&x)[8]) {
  UNROLL_FOR (int i = 0; i < 8; ++i) x[i] = widen(T{(uint16_t)(from.words[0].word[i / 2] >> i % 2 * 16)});
}

template <class T>
DEVICE void load_8(const T* p, float (&x)[8]) {
  widen(*(const Eight<T>*)p, x);
}

DEVICE void store_8(float* p, const float (&x)[8]) {
  Words4 words[2];
  memcpy(words, x, sizeof words);
  ((Words4*)p)[0] = words[0], ((Words4*)p)[1] = words[1];
}
template <class T>
DEVICE void store_8(T* p, const float (&x)[8]) {
  Words4 words;
  UNROLL_FOR (int i = 0; i < 4; ++i) words.word[i] = pack(T{}, x[2 * i], x[2 * i + 1]);
  *(Words4*)p = words;
}

// The same with a bound on the columns; elements beyond it are zero, and are not written. ALIGNED: the number of
// columns is a multiple of 8 and every row is aligned to 16 bytes, so that groups of 8 are accessed as a whole.
template <bool ALIGNED, class T>
DEVICE Eight<T> load_8(const T* row, int column, int columns) {
  Eight<T> loaded = {};
  if constexpr (ALIGNED) {
    if (column < columns) loaded = *(const Eight<T>*)(row + column);
  } else {
    T elements[8] = {};
    UNROLL_FOR (int i = 0; i < 8; ++i)
      if (column + i < columns) elements[i] = row[column + i];
    memcpy(&loaded, elements, sizeof loaded);
  }
  return loaded;
}
template <bool ALIGNED, class T>
DEVICE void load_8(const T* row, int column, int columns, float (&x)[8]) {
  widen(load_8<ALIGNED>(row, column, columns), x);
}
template <bool ALIGNED, class T>
DEVICE void store_8(T* row, int column, int columns, const float (&x)[8]) {
  if constexpr (ALIGNED) {
    if (column < columns) store_8(row + column, x);
  } else {
    UNROLL_FOR (int i = 0; i < 8; ++i)
      if (column + i < columns) store(row + column + i, x[i]);
  }
}

template <class T>
DEVICE T* row(const Rows& x, int64_t index) {
  return (T*)x.data + index * x.stride;
}

inline int bytes_of(Type type) { return type == Type::float32 ? 4 : 2; }

// Whether rows of `columns` columns are ALIGNED.
inline bool is_aligned(const Rows& x, int64_t columns) {
  return x.data == nullptr ||
         (columns % 8 == 0 && (uintptr_t)x.data % 16 == 0 && x.stride * bytes_of(x.type) % 16 == 0);
}

// Call f(T{}) with the element type of a tensor.
template <class F>
void with_type(Type type, const F& f) {
  switch (type) {
    case Type::float32: return f(float{});
    case Type::bfloat16: return f(BFloat16{});
    default: return f(Half{});
  }
}

// Call f(X{}, R{}) with the element types of x and another tensor: the same, or 16 bits and fp32, as in autocast.
template <class F>
void with_types(Type x, Type other, const F& f) {
  if (x != other && other != Type::float32)
    throw std::runtime_error("the residual or weights must have the dtype of x, or float32");
  with_type(x, [&]<class X>(X) {
    if (x == other) return f(X{}, X{});
    if constexpr (sizeof(X) == 2) f(X{}, float{});
  });
}

}  // namespace bertfast::cuda
