// GELU (Hendrycks and Gimpel, 2016) and its derivative: u · Φ(u), or u · σ(2 v), the tanh formula with v inside.
//
// Each takes one exponential and one reciprocal, which the derivative shares, so that the kernels are bound by memory
// bandwidth: erff alone takes more instructions than the load and store of a bf16 element leave time for.
#pragma once
#include "hopper.cuh"

namespace bertfast::cuda {

struct Curve {
  float value, slope;
};

// The cumulative distribution function of a random variable, and its density.
struct Distribution {
  float cumulative, density;
};

// The standard normal distribution, Φ to 7.5e-8 (Abramowitz and Stegun, 1964, formula 26.2.17).
DEVICE Distribution normal_distribution(float u) {
  const float density = fast_exp2(-0.7213475204444817f * u * u - 1.3257480647361593f);  // e^(-u² / 2) / sqrt(2 π)
  const float t = fast_reciprocal(1.f + 0.2316419f * fabsf(u));
  const float series = (((1.330274429f * t - 1.821255978f) * t + 1.781477937f) * t - 0.356563782f) * t + 0.319381530f;
  const float tail = density * t * series;
  return {u > 0 ? 1.f - tail : tail, density};
}

// The logistic distribution, from its tail, which neither overflows nor cancels.
DEVICE Distribution logistic_distribution(float x) {
  const float e = fast_exp2(-1.4426950408889634f * fabsf(x)), tail = e * fast_reciprocal(1.f + e);
  return {x > 0 ? 1.f - tail : tail, tail * (1.f - tail)};
}

template <bool TANH>
DEVICE Curve gelu(float u) {
  Distribution weight;  // of u, by which GELU multiplies it
  if constexpr (TANH) {
    const float square = u * u;
    weight = logistic_distribution(u * (square * 0.0713548162726f + 1.5957691216057308f));  // 2 v
    weight.density *= square * 0.2140644488178f + 1.5957691216057308f;
  } else {
    weight = normal_distribution(u);
  }
  return {u * weight.cumulative, weight.cumulative + u * weight.density};
}

}  // namespace bertfast::cuda
