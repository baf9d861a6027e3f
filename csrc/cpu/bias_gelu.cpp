#include "../bias_gelu.h"

#include "gelu.h"
#include "rows.h"

namespace bertfast::BERTFAST_SET {

template <class T, bool TANH>
static void forward(const BiasGeluForward& a) {
  parallel(a.tokens, 16, [&](int64_t first, int64_t end) {
    thread_local Scratch floats;
    float* const bias = floats.reserve<float>(padded(a.columns));
    widen(a.bias, a.columns, bias);
    for (int64_t token = first; token < end; ++token) {
      const T* const x = row<T>(a.x, token);
      T* const y = row<T>(a.y, token);
      for_each_vector(a.columns, [&](int64_t column, int count) {
        store_columns(y + column, gelu<T, TANH>(load_columns(x + column, count) + load(bias + column)).value, count);
      });
    }
  });
}

template <class T, bool TANH>
static void backward(const BiasGeluBackward& a) {
  sum_over_rows<1>(a.tokens, a.columns, a.d_bias, [&](int64_t first, int64_t end, float* sums) {
    thread_local Scratch floats;
    float* const bias = floats.reserve<float>(padded(a.columns));
    widen(a.bias, a.columns, bias);
    for (int64_t token = first; token < end; ++token) {
      const T *const d_y = row<T>(a.d_y, token), *const x = row<T>(a.x, token);
      T* const d_x = row<T>(a.d_x, token);
      for_each_vector(a.columns, [&](int64_t column, int count) {
        const Floats slope = gelu<T, TANH>(load_columns(x + column, count) + load(bias + column)).slope;
        const Floats d = load_columns(d_y + column, count) * slope;
        store_columns(d_x + column, d, count);
        add_to(sums + column, d);
      });
    }
  });
}

void bias_gelu_forward(const BiasGeluForward& a) {
  with_type(a.x.type, [&]<class T>(T) { a.tanh ? forward<T, true>(a) : forward<T, false>(a); });
}

void bias_gelu_backward(const BiasGeluBackward& a) {
  with_type(a.x.type, [&]<class T>(T) { a.tanh ? backward<T, true>(a) : backward<T, false>(a); });
}

}  // namespace bertfast::BERTFAST_SET
