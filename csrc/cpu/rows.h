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

// f(X{}, R{}) with the C++ types of two tensors.
template <class F>
INLINE void with_type(Type type, const F& f) {
  type == Type::float32 ? f(float{}) : f(BFloat16{});
}

template <class F>
INLINE void with_types(Type x, Type r, const F& f) {
  with_type(x, [&]<class X>(X x) { with_type(r, [&]<class R>(R r) { f(x, r); }); });
}

// The slots' sums [slots, size], added in order into out [size].
static inline void add_slots(const float* slots, int64_t count, int64_t size, float* out) {
  across(size, [&](int64_t column, int some) {
    Floats total{};
    for (int64_t slot = 0; slot < count; ++slot) total += load_columns(slots + slot * size + column, some);
    store_columns(out + column, total, some);
  });
}

}  // namespace bertfast::BERTFAST_SET
