// Shared by the row kernels: vectors in fp32, LayerNorm, and sums over rows.
//
// Buffers hold H elements rounded up to whole registers; the lanes beyond H are zero.
#pragma once
#include "parallel.h"
#include "scratch.h"
#include "vector.h"

namespace bertfast::BERTFAST_SET {

INLINE int64_t padded(int64_t hidden) { return (hidden + LANES - 1) / LANES * LANES; }

template <class T>
INLINE T* row(const Rows& x, int64_t index) {
  return (T*)x.data + index * x.stride;
}

// Call f(column, count) for each register of a row; `count` is LANES, or less at the row's end.
template <class F>
INLINE void for_each_vector(int64_t hidden, const F& f) {
  int64_t column = 0;
  for (; column + 4 * LANES <= hidden; column += 4 * LANES)
    UNROLL_FOR (int i = 0; i < 4; ++i) f(column + i * LANES, LANES);
  for (; column + LANES <= hidden; column += LANES) f(column, LANES);
  if (column < hidden) f(column, (int)(hidden - column));
}

// A sum of registers in four rotating accumulators, which hides the latency of the additions.
class Sum {
 public:
  [[gnu::always_inline]] void operator+=(Floats x) {
    const Floats next = parts_[0] + x;
    parts_[0] = parts_[1], parts_[1] = parts_[2], parts_[2] = parts_[3], parts_[3] = next;
  }
  [[gnu::always_inline]] float total() const { return sum((parts_[0] + parts_[1]) + (parts_[2] + parts_[3])); }

 private:
  Floats parts_[4] = {};
};

template <class T>
INLINE Floats load_columns(const T* p, int count) {
  return count == LANES ? load(p) : load(p, count);
}

template <class T>
INLINE void store_columns(T* p, Floats x, int count) {
  count == LANES ? store(p, x) : store(p, x, count);
}

// Convert `hidden` elements of a parameter, from `offset` on, to fp32, zero beyond them; all zeros if it is absent.
static inline void widen(const Vector& vector, int64_t hidden, float* out, int64_t offset = 0) {
  for_each_vector(hidden, [&](int64_t column, int count) {
    Floats x{};
    if (vector.data != nullptr)
      x = vector.type == Type::float32 ? load_columns((const float*)vector.data + offset + column, count)
                                       : load_columns((const BFloat16*)vector.data + offset + column, count);
    store(out + column, x);
  });
}

INLINE void add_to(float* p, Floats x) { store(p, load(p) + x); }

struct LayerNorm {
  float mean, rstd;
  [[gnu::always_inline]] Floats operator()(Floats z) const { return (z - mean) * rstd; }
};

// Store the row that compute(column, count) returns in `z`, and return its mean and rstd, computed in two passes. If
// not CENTRED, as in RMSNorm, the mean is not subtracted, and 0 is returned for it; one pass is enough.
template <bool CENTRED = true, class F>
INLINE LayerNorm statistics(int64_t hidden, float eps, float* z, const F& compute) {
  Sum sum, squares;
  for_each_vector(hidden, [&](int64_t column, int count) {
    const Floats value = compute(column, count);
    store(z + column, value);
    if constexpr (CENTRED) sum += value;
    else squares += value * value;
  });
  if constexpr (!CENTRED) return {0, 1 / __builtin_sqrtf(squares.total() / hidden + eps)};
  const float mean = sum.total() / hidden;
  for_each_vector(hidden, [&](int64_t column, int count) {
    Floats centred = load(z + column) - mean;
    if (count < LANES) centred = lane_ids() < splat((uint32_t)count) ? centred : splat(0.f);
    squares += centred * centred;
  });
  return {mean, 1 / __builtin_sqrtf(squares.total() / hidden + eps)};
}

// Gradient of y = LN(z) for one row. z(column, count) and d_y(column, count) return registers, d_y zero beyond the
// row's end; d_z(column, count, gradient) receives the gradient of z. `buffer` holds two rows. If not CENTRED, y is an
// RMSNorm, and beta_sums is not written.
template <bool CENTRED = true, class Z, class DY, class DZ>
INLINE void differentiate(const LayerNorm& norm, int64_t hidden, const float* gamma, float* gamma_sums,
                          float* beta_sums, float* buffer, const Z& z, const DY& d_y, const DZ& d_z) {
  float *const normal = buffer, *const weighted = buffer + padded(hidden);
  Sum sum, projection;
  for_each_vector(hidden, [&](int64_t column, int count) {
    const Floats n = norm(z(column, count)), d = d_y(column, count), w = d * load(gamma + column);
    store(normal + column, n), store(weighted + column, w);
    projection += w * n;
    add_to(gamma_sums + column, d * n);
    if constexpr (CENTRED) sum += w, add_to(beta_sums + column, d);
  });
  const float offset = CENTRED ? sum.total() / hidden : 0, slope = projection.total() / hidden;
  for_each_vector(hidden, [&](int64_t column, int count) {
    d_z(column, count, (load(weighted + column) - (load(normal + column) * slope + offset)) * norm.rstd);
  });
}

// Call f with the C++ element type of a tensor, or of two.
template <class F>
INLINE void with_type(Type type, const F& f) {
  type == Type::float32 ? f(float{}) : f(BFloat16{});
}

template <class F>
INLINE void with_types(Type x, Type r, const F& f) {
  with_type(x, [&]<class X>(X x) { with_type(r, [&]<class R>(R r) { f(x, r); }); });
}

// Sum over rows: call f(first, end, sums) for slots of `rows` rows; each adds to its own `sums`, N rows padded(hidden)
// apart, zero at first. `out` [N, hidden] is the sum over all slots. Slots depend on the number of rows only, so
// results are bitwise identical for any number of threads.
template <int N, class F>
static inline void sum_over_rows(int64_t rows, int64_t hidden, float* out, const F& f) {
  static thread_local Scratch memory;
  const int64_t slots = rows < 64 ? 1 : rows < 64 * 32 ? rows / 32 : 64, width = padded(hidden), size = N * width;
  float* const partial_sums = memory.reserve<float>(slots * size);
  parallel(slots, 1, [&](int64_t first, int64_t end) {
    for (int64_t slot = first; slot < end; ++slot) {
      std::memset(partial_sums + slot * size, 0, size * sizeof(float));
      f(rows * slot / slots, rows * (slot + 1) / slots, partial_sums + slot * size);
    }
  });
  parallel(size / LANES, 64, [&](int64_t first, int64_t end) {
    for (int64_t offset = first * LANES; offset < end * LANES; offset += LANES) {
      Floats total{};
      for (int64_t slot = 0; slot < slots; ++slot) total += load(partial_sums + slot * size + offset);
      const int64_t column = offset % width, left = hidden - column;
      store_columns(out + offset / width * hidden + column, total, left < LANES ? (int)left : LANES);
    }
  });
}

}  // namespace bertfast::BERTFAST_SET
