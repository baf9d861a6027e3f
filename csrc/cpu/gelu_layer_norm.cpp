#include "../gelu_layer_norm.h"

#include "gelu.h"
#include "rows.h"

namespace bertfast::BERTFAST_SET {

template <class X, class Y>
static void forward(const GeluLayerNormForward& a) {
  parallel(a.count, 16, [&](int64_t first, int64_t end) {
    thread_local Scratch floats;
    const int64_t width = padded(a.hidden);
    float* const bias = floats.reserve<float>(4 * width);
    float *const gamma = bias + width, *const beta = gamma + width, *const z = beta + width;
    widen(a.bias, a.hidden, bias), widen(a.gamma, a.hidden, gamma), widen(a.beta, a.hidden, beta);
    for (int64_t index = first; index < end; ++index) {
      const X* const x = row<X>(a.x, index);
      Y* const y = row<Y>(a.y, index);
      const LayerNorm norm = statistics(a.hidden, a.eps, z, [&](int64_t column, int count) {
        return gelu<X, false>(load_columns(x + column, count) + load(bias + column)).value;
      });
      for_each_vector(a.hidden, [&](int64_t column, int count) {
        store_columns(y + column, norm(load(z + column)) * load(gamma + column) + load(beta + column), count);
      });
      a.mean[index] = norm.mean, a.rstd[index] = norm.rstd;
    }
  });
}

template <class X, class Y>
static void backward(const GeluLayerNormBackward& a) {
  const int64_t width = padded(a.hidden);
  sum_over_rows<3>(a.count, a.hidden, a.sums, [&](int64_t first, int64_t end, float* sums) {
    thread_local Scratch floats;
    float* const bias = floats.reserve<float>(5 * width);
    float *const gamma = bias + width, *const slope = gamma + width, *const reserve = slope + width;
    widen(a.bias, a.hidden, bias), widen(a.gamma, a.hidden, gamma);
    for (int64_t index = first; index < end; ++index) {
      const X* const x = row<X>(a.x, index);
      const Y* const d_y = row<Y>(a.d_y, index);
      X* const d_x = row<X>(a.d_x, index);
      differentiate(
          LayerNorm{a.mean[index], a.rstd[index]}, a.hidden, gamma, sums, sums + width, reserve,
          [&](int64_t column, int count) {
            const Curve curve = gelu<X, false>(load_columns(x + column, count) + load(bias + column));
            store(slope + column, curve.slope);
            return curve.value;
          },
          [&](int64_t column, int count) { return load_columns(d_y + column, count); },
          [&](int64_t column, int count, Floats d_z) {
            const Floats d = d_z * load(slope + column);
            store_columns(d_x + column, d, count);
            add_to(sums + 2 * width + column, d);
          });
    }
  });
}

void gelu_layer_norm_forward(const GeluLayerNormForward& a) {
  with_types(a.x.type, a.y.type, [&]<class X, class Y>(X, Y) { forward<X, Y>(a); });
}

void gelu_layer_norm_backward(const GeluLayerNormBackward& a) {
  with_types(a.x.type, a.d_y.type, [&]<class X, class Y>(X, Y) { backward<X, Y>(a); });
}

}  // namespace bertfast::BERTFAST_SET
