// What the kernels on rows share: vectors in fp32, LayerNorm's statistics, and sums over rows.
//
// Buffers have room for H rounded up to whole registers, of which the last lanes are zero.
#pragma once
#include "parallel.h"
#include "scratch.h"
#include "vector.h"

namespace bertfast::BERTFAST_SET {

INLINE int64_t padded(int64_t hidden) { return (hidden + LANES - 1) / LANES * LANES; }

// f(column, count) for each register of a row: `count` is LANES but at its end.
template <class F>
INLINE void across(int64_t hidden, const F& f) {
  int64_t column = 0;
  for (; column + LANES <= hidden; column += LANES) f(column, LANES);
  if (column < hidden) f(column, (int)(hidden - column));
}

template <class T>
INLINE Floats load_columns(const T* p, int count) {
  return count == LANES ? load(p) : load(p, count);
}

template <class T>
INLINE void store_columns(T* p, Floats x, int count) {
  count == LANES ? store(p, x) : store(p, x, count);
}

// A parameter in fp32, zero beyond its end; zero all over where there is none.
static inline void widen(const Vector& vector, int64_t hidden, float* out) {
  across(hidden, [&](int64_t column, int count) {
    Floats x{};
    if (vector.data != nullptr)
      x = vector.type == Type::float32 ? load_columns((const float*)vector.data + column, count)
                                       : load_columns((const BFloat16*)vector.data + column, count);
    store(out + column, x);
  });
}

// z becomes (z - mean) / deviation, of which the factor 1 / deviation is returned; statistics in two passes.
INLINE float normalise(float* z, int64_t hidden, float eps, float* mean) {
  Floats total[4] = {};
  for (int64_t column = 0; column < padded(hidden); column += LANES) total[column / LANES % 4] += load(z + column);
  *mean = sum((total[0] + total[1]) + (total[2] + total[3])) / hidden;
  Floats squares[4] = {};
  across(hidden, [&](int64_t column, int count) {
    Floats centred = load(z + column) - *mean;
    if (count < LANES) centred = lane_numbers() < splat((uint32_t)count) ? centred : splat(0.f);
    squares[column / LANES % 4] += centred * centred;
    store(z + column, centred);
  });
  const float variance = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / hidden;
  const float rstd = 1 / __builtin_sqrtf(variance + eps);
  for (int64_t column = 0; column < padded(hidden); column += LANES) store(z + column, load(z + column) * rstd);
  return rstd;
}

// y = z · gamma + beta.
template <class Y>
INLINE void store_affine(const float* z, const float* gamma, const float* beta, int64_t hidden, Y* y) {
  across(hidden, [&](int64_t column, int count) {
    store_columns(y + column, load(z + column) * load(gamma + column) + load(beta + column), count);
  });
}

// The gradient d_z of z, from that of y = LN(z), and its share of the sums for gamma and beta; z becomes (z - mean) · rstd.
template <class T>
INLINE void differentiate_layer_norm(const T* d_y, float* z, const float* gamma, float mean, float rstd, int64_t hidden,
                                     float* d_z, float* gamma_sums, float* beta_sums) {
  Floats total[2] = {}, projection[2] = {};
  across(hidden, [&](int64_t column, int count) {
    const Floats d = load_columns(d_y + column, count), normal = (load(z + column) - mean) * rstd;
    const Floats g = d * load(gamma + column);
    store(z + column, normal), store(d_z + column, g);
    total[column / LANES % 2] += g, projection[column / LANES % 2] += g * normal;
    store(gamma_sums + column, load(gamma_sums + column) + d * normal);
    store(beta_sums + column, load(beta_sums + column) + d);
  });
  const float offset = sum(total[0] + total[1]) / hidden, slope = sum(projection[0] + projection[1]) / hidden;
  for (int64_t column = 0; column < padded(hidden); column += LANES)
    store(d_z + column, (load(d_z + column) - (load(z + column) * slope + offset)) * rstd);
}

// Row `index` of a tensor whose elements are of type T.
template <class T>
INLINE T* row(const Rows& x, int64_t index) {
  return static_cast<T*>(x.data) + index * x.stride;
}

// f with a value of the C++ type of a tensor, or of two.
template <class F>
INLINE void with_type(Type type, const F& f) {
  type == Type::float32 ? f(float{}) : f(BFloat16{});
}

template <class F>
INLINE void with_types(Type x, Type r, const F& f) {
  with_type(x, [&]<class X>(X x) { with_type(r, [&]<class R>(R r) { f(x, r); }); });
}

// Sums over rows of `vectors` vectors: f(first, end, share) adds what the rows first … end - 1 have to a share
// [vectors, padded(size)]. Shares are of fixed rows and added in order, so that the bits do not depend on the threads.
template <class F>
static inline void sum_over_rows(int64_t rows, int64_t vectors, int64_t size, float* sums, const F& f) {
  const int64_t shares = rows < 32 ? 1 : rows < 64 * 32 ? rows / 32 : 64, width = padded(size);
  thread_local Scratch scratch;
  float* const all = scratch.room<float>(shares * vectors * width);
  parallel(shares, 1, [&](int64_t first, int64_t end) {
    for (int64_t share = first; share < end; ++share) {
      float* const own = all + share * vectors * width;
      std::memset(own, 0, vectors * width * sizeof(float));
      f(rows * share / shares, rows * (share + 1) / shares, own);
    }
  });
  for (int64_t vector = 0; vector < vectors; ++vector)
    across(size, [&](int64_t column, int count) {
      Floats total{};
      for (int64_t share = 0; share < shares; ++share) total += load(all + (share * vectors + vector) * width + column);
      store_columns(sums + vector * size + column, total, count);
    });
}

}  // namespace bertfast::BERTFAST_SET
