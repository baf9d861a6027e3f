#include "../gated_activation.h"

#include "gelu.h"
#include "rows.h"

namespace bertfast::BERTFAST_SET {

template <class T, Activation ACTIVATION>
INLINE Curve activate(Floats u) {
  if constexpr (ACTIVATION == Activation::silu) return silu<T>(u);
  else return gelu<T, ACTIVATION == Activation::gelu_tanh>(u);
}

template <class T, Activation ACTIVATION>
static void forward(const GatedActivationForward& a) {
  parallel(a.tokens, 16, [&](int64_t first, int64_t end) {
    thread_local Scratch floats;
    float* const bias = floats.reserve<float>(2 * padded(a.columns));
    float* const gate_bias = bias + padded(a.columns);
    widen(a.bias, a.columns, bias), widen(a.bias, a.columns, gate_bias, a.columns);
    for (int64_t token = first; token < end; ++token) {
      const T *const hidden = row<T>(a.x, token), *const gate = hidden + a.columns;
      T* const y = row<T>(a.y, token);
      for_each_vector(a.columns, [&](int64_t column, int count) {
        const Floats activated =
            activate<T, ACTIVATION>(load_columns(hidden + column, count) + load(bias + column)).value;
        store_columns(y + column, activated * (load_columns(gate + column, count) + load(gate_bias + column)), count);
      });
    }
  });
}

template <class T, Activation ACTIVATION>
static void backward(const GatedActivationBackward& a) {
  const int64_t width = padded(a.columns);
  const auto differentiate_rows = [&](int64_t first, int64_t end, float* sums) {
    thread_local Scratch floats;
    float *const bias = floats.reserve<float>(2 * width), *const gate_bias = bias + width;
    widen(a.bias, a.columns, bias), widen(a.bias, a.columns, gate_bias, a.columns);
    for (int64_t token = first; token < end; ++token) {
      const T *const hidden = row<T>(a.x, token), *const gate = hidden + a.columns, *const d_y = row<T>(a.d_y, token);
      T *const d_hidden = row<T>(a.d_x, token), *const d_gate = d_hidden + a.columns;
      for_each_vector(a.columns, [&](int64_t column, int count) {
        const Curve curve = activate<T, ACTIVATION>(load_columns(hidden + column, count) + load(bias + column));
        const Floats d = load_columns(d_y + column, count);
        const Floats d_first = d * (load_columns(gate + column, count) + load(gate_bias + column)) * curve.slope;
        const Floats d_second = d * curve.value;
        store_columns(d_hidden + column, d_first, count), store_columns(d_gate + column, d_second, count);
        if (sums) add_to(sums + column, d_first), add_to(sums + width + column, d_second);
      });
    }
  };
  if (a.d_bias) return sum_over_rows<2>(a.tokens, a.columns, a.d_bias, differentiate_rows);
  parallel(a.tokens, 16, [&](int64_t first, int64_t end) { differentiate_rows(first, end, nullptr); });
}

// Call f<T, ACTIVATION>() for a type and an activation.
template <class F>
static void with_activation(Type type, Activation activation, const F& f) {
  with_type(type, [&]<class T>(T) {
    switch (activation) {
      case Activation::gelu: return f.template operator()<T, Activation::gelu>();
      case Activation::gelu_tanh: return f.template operator()<T, Activation::gelu_tanh>();
      case Activation::silu: return f.template operator()<T, Activation::silu>();
    }
  });
}

void gated_activation_forward(const GatedActivationForward& a) {
  with_activation(a.x.type, a.activation, [&]<class T, Activation ACTIVATION>() { forward<T, ACTIVATION>(a); });
}

void gated_activation_backward(const GatedActivationBackward& a) {
  with_activation(a.x.type, a.activation, [&]<class T, Activation ACTIVATION>() { backward<T, ACTIVATION>(a); });
}

}  // namespace bertfast::BERTFAST_SET
