// GELU (Hendrycks and Gimpel, 2016): u · Φ(u), or u · σ(2 v), which is the tanh formula with v inside. SiLU: u · σ(u).
//
// Each takes one exponential and one division, which the derivative shares. T is the type in which results are stored:
// bf16 rounds by up to 2e-3, relatively, so that an error of 2e-4 makes no difference.
#pragma once
#include "vector.h"

namespace bertfast::BERTFAST_SET {

// A distribution symmetric about 0, at x: the tail probability beyond |x|, free of cancellation and overflow, and the
// density.
struct Distribution {
  Floats tail, density;
};

template <class T>
constexpr bool IS_FLOAT = sizeof(T) == sizeof(float);

template <class T>
INLINE Floats exponential(Floats power) {
  return exp2<IS_FLOAT<T> ? 6 : 4>(power);
}

template <class T>
INLINE Floats reciprocal(Floats x) {
  if constexpr (IS_FLOAT<T>) return 1.f / x;
  else return reciprocal_estimate(x);
}

// The standard normal distribution: the tail is density · t · series(t), t = 1 / (1 + c |x|), as in formula 26.2.17 of
// Abramowitz and Stegun (1964), with a series fitted to a relative error of 2.5e-8, or of 3.5e-5 for bf16.
template <class T>
INLINE Distribution normal(Floats x) {
  const Floats density = exponential<T>(x * x * -0.7213475204444817f - 1.3257480647361593f);  // e^(-x²/2) / sqrt(2π)
  const Floats t = reciprocal<T>(absolute(x) * (IS_FLOAT<T> ? 0.26f : 0.37f) + 1.f);
  Floats series;
  if constexpr (IS_FLOAT<T>) {
    series = t * 0.0764636716f - 0.383081251f;
    series = series * t + 0.630386868f;
    series = series * t - 0.378362924f;
    series = series * t + 0.403429168f;
    series = series * t + 0.127910688f;
    series = series * t + 0.258257671f;
    series = series * t + 0.258224829f;
    series = series * t + 0.260085385f;
  } else {
    series = t * -0.2264792f + 0.5262245f;
    series = series * t + 0.19085031f;
    series = series * t + 0.39448467f;
    series = series * t + 0.36827294f;
  }
  return {density * t * series, density};
}

template <class T>
INLINE Distribution logistic(Floats x) {
  const Floats e = exponential<T>(absolute(x) * -1.4426950408889634f);
  const Floats tail = IS_FLOAT<T> ? e / (e + 1.f) : e * reciprocal<T>(e + 1.f);
  return {tail, tail * (1.f - tail)};
}

struct Curve {
  Floats value, slope;
};

// Value and derivative of u · F(v(u)), where `at` describes the distribution F at v(u), and `inner` is v's derivative.
// The value is written as a difference, not as a single multiplication, which the compiler might fuse with a later
// addition in one pass and not in the other; forward and backward pass must agree bitwise.
INLINE Curve curve(Floats u, Distribution at, Floats inner) {
  return {maximum(u, splat(0.f)) - absolute(u) * at.tail,
          (u > splat(0.f) ? 1.f - at.tail : at.tail) + u * at.density * inner};
}

// GELU and its derivative at u.
template <class T, bool TANH>
INLINE Curve gelu(Floats u) {
  if constexpr (!TANH) return curve(u, normal<T>(u), splat(1.f));
  const Floats square = u * u;  // 2 v = 2 sqrt(2 / π) · (u + 0.044715 u³)
  const Distribution at = logistic<T>(u * (square * 0.0713548162726f + 1.5957691216057308f));
  return curve(u, at, square * 0.2140644488178f + 1.5957691216057308f);
}

// SiLU, u · σ(u), and its derivative at u.
template <class T>
INLINE Curve silu(Floats u) {
  return curve(u, logistic<T>(u), splat(1.f));
}

}  // namespace bertfast::BERTFAST_SET
