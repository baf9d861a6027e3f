// GELU (Hendrycks and Gimpel, 2016): u · Φ(u), or u · σ(2 v), which is the tanh formula with v inside; as kernels/gelu.py.
#pragma once
#include "vector.h"

namespace bertfast::BERTFAST_SET {

// A distribution and its density at some point.
struct Distribution {
  Floats below, density;
};

// The standard normal distribution, Φ to 7.5e-8 (Abramowitz and Stegun, 1964, formula 26.2.17).
INLINE Distribution normal_distribution(Floats u) {
  const Floats density = exp2(u * u * -0.7213475204444817f - 1.3257480647361593f);  // e^(-u² / 2) / sqrt(2 π)
  const Floats t = 1.f / (absolute(u) * 0.2316419f + 1.f);
  Floats series = t * 1.330274429f - 1.821255978f;
  series = series * t + 1.781477937f;
  series = series * t - 0.356563782f;
  series = series * t + 0.319381530f;
  const Floats tail = density * t * series;
  return {u > splat(0.f) ? 1.f - tail : tail, density};
}

// The logistic distribution, from its tail, which neither overflows nor cancels.
INLINE Distribution logistic_distribution(Floats x) {
  const Floats e = exp2(absolute(x) * -1.4426950408889634f), tail = e / (e + 1.f);
  return {x > splat(0.f) ? 1.f - tail : tail, tail * (1.f - tail)};
}

// 2 v, where v = sqrt(2 / π) · (u + 0.044715 u³).
INLINE Floats doubled_argument(Floats u) { return u * (u * u * 0.0713548162726f + 1.5957691216057308f); }

template <bool TANH>
INLINE Floats gelu(Floats u) {
  if constexpr (TANH) return u * logistic_distribution(doubled_argument(u)).below;
  return u * normal_distribution(u).below;
}

template <bool TANH>
INLINE Floats gelu_derivative(Floats u) {
  if constexpr (TANH) {
    const Distribution at = logistic_distribution(doubled_argument(u));
    return at.below + u * at.density * (u * u * 0.2140644488178f + 1.5957691216057308f);
  }
  const Distribution at = normal_distribution(u);
  return at.below + u * at.density;
}

}  // namespace bertfast::BERTFAST_SET
