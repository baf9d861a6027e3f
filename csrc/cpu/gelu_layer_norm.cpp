#include "gelu_layer_norm.h"

#include "gelu.h"
#include "rows.h"

namespace bertfast::BERTFAST_SET {

template <class X>
INLINE void activate(const X* x, const float* bias, int64_t hidden, float* z) {
  across(hidden, [&](int64_t column, int count) {
    store(z + column, gelu<false>(load_columns(x + column, count) + load(bias + column)));
  });
}

template <class X, class Y>
static void forward(const GeluLayerNormForward& a) {
  const int64_t width = padded(a.hidden);
  parallel(a.rows, 8, [&](int64_t first, int64_t end) {
    thread_local Scratch scratch;
    float* const bias = scratch.room<float>(4 * width);
    float *const gamma = bias + width, *const beta = gamma + width, *const z = beta + width;
    widen(a.bias, a.hidden, bias), widen(a.gamma, a.hidden, gamma), widen(a.beta, a.hidden, beta);
    for (int64_t index = first; index < end; ++index) {
      activate(row<X>(a.x, index), bias, a.hidden, z);
      a.rstd[index] = normalise(z, a.hidden, a.eps, &a.mean[index]);
      store_affine(z, gamma, beta, a.hidden, row<Y>(a.y, index));
    }
  });
}

template <class X, class Y>
static void backward(const GeluLayerNormBackward& a) {
  const int64_t width = padded(a.hidden);
  sum_over_rows(a.rows, 3, a.hidden, a.sums, [&](int64_t first, int64_t end, float* sums) {
    thread_local Scratch scratch;
    float* const bias = scratch.room<float>(4 * width);
    float *const gamma = bias + width, *const z = gamma + width, *const d_z = z + width;
    widen(a.bias, a.hidden, bias), widen(a.gamma, a.hidden, gamma);
    for (int64_t index = first; index < end; ++index) {
      const X* const x = row<X>(a.x, index);
      X* const d_x = row<X>(a.d_x, index);
      activate(x, bias, a.hidden, z);
      differentiate_layer_norm(row<Y>(a.d_y, index), z, gamma, a.mean[index], a.rstd[index], a.hidden, d_z, sums,
                               sums + width);
      across(a.hidden, [&](int64_t column, int count) {
        const Floats u = load_columns(x + column, count) + load(bias + column);
        const Floats d = load(d_z + column) * gelu_derivative<false>(u);
        store_columns(d_x + column, d, count);
        store(sums + 2 * width + column, load(sums + 2 * width + column) + d);
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
