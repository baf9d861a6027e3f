#include "bias_gelu.h"

#include "gelu.h"
#include "rows.h"

namespace bertfast::BERTFAST_SET {

template <class X, bool TANH>
static void forward(const BiasGeluForward& a) {
  parallel(a.tokens, 8, [&](int64_t first, int64_t end) {
    thread_local Scratch scratch;
    float* const bias = scratch.room<float>(padded(a.columns));
    widen(a.bias, a.columns, bias);
    for (int64_t token = first; token < end; ++token) {
      const X* const x = row<X>(a.x, token);
      X* const y = row<X>(a.y, token);
      across(a.columns, [&](int64_t column, int count) {
        store_columns(y + column, gelu<TANH>(load_columns(x + column, count) + load(bias + column)), count);
      });
    }
  });
}

template <class X, bool TANH>
static void backward(const BiasGeluBackward& a) {
  sum_over_rows(a.tokens, 1, a.columns, a.d_bias, [&](int64_t first, int64_t end, float* sums) {
    thread_local Scratch scratch;
    float* const bias = scratch.room<float>(padded(a.columns));
    widen(a.bias, a.columns, bias);
    for (int64_t token = first; token < end; ++token) {
      const X *const d_y = row<X>(a.d_y, token), *const x = row<X>(a.x, token);
      X* const d_x = row<X>(a.d_x, token);
      across(a.columns, [&](int64_t column, int count) {
        const Floats u = load_columns(x + column, count) + load(bias + column);
        const Floats d = load_columns(d_y + column, count) * gelu_derivative<TANH>(u);
        store_columns(d_x + column, d, count);
        store(sums + column, load(sums + column) + d);
      });
    }
  });
}

void bias_gelu_forward(const BiasGeluForward& a) {
  with_type(a.x.type, [&]<class X>(X) { a.tanh ? forward<X, true>(a) : forward<X, false>(a); });
}

void bias_gelu_backward(const BiasGeluBackward& a) {
  with_type(a.x.type, [&]<class X>(X) { a.tanh ? backward<X, true>(a) : backward<X, false>(a); });
}

}  // namespace bertfast::BERTFAST_SET
