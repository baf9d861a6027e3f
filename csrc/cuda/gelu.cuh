// GELU (Hendrycks and Gimpel, 2016) and its derivative: u · Φ(u), or u · σ(2 v), the tanh formula with v inside.
#pragma once
#include "hopper.cuh"

namespace bertfast::cuda {

struct Curve {
  float value, slope;
};

DEVICE Curve gelu(float u, bool tanh) {
  if (tanh) {
    const float inner = u * (u * u * 0.0713548162726f + 1.5957691216057308f);  // 2 sqrt(2 / π) (u + 0.044715 u³)
    const float e = expf(-fabsf(inner)), tail = e / (1.f + e), p = inner > 0 ? 1.f - tail : tail;
    return {u * p, p + u * tail * (1.f - tail) * (u * u * 0.2140644488178f + 1.5957691216057308f)};
  }
  const float p = 0.5f * (1.f + erff(u * 0.70710678118654752f));
  return {u * p, p + u * 0.3989422804014327f * expf(-0.5f * u * u)};
}

}  // namespace bertfast::cuda
