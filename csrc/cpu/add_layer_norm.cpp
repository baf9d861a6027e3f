#include "add_layer_norm.h"

#include "dropout.h"
#include "rows.h"

namespace bertfast::BERTFAST_SET {

// A token's z, zero beyond its end; without `bytes` nothing is dropped.
template <class X, class R>
INLINE void add(const X* x, const R* residual, const float* bias, const uint8_t* bytes, int threshold, int64_t hidden,
                float* z) {
  across(hidden, [&](int64_t column, int count) {
    Floats sum = load_columns(x + column, count) + load(bias + column);
    if (bytes != nullptr) sum *= factors(bytes + column, threshold);
    store(z + column, load_columns(residual + column, count) + sum);
  });
}

template <class X, class R>
static void forward(const AddLayerNormForward& a) {
  const int64_t width = padded(a.hidden);
  parallel(a.tokens, 16, [&](int64_t first, int64_t end) {
    thread_local Scratch floats, masks;
    float* const bias = floats.room<float>(4 * width);
    float *const gamma = bias + width, *const beta = gamma + width, *const z = beta + width;
    uint8_t* const bytes = a.dropout.threshold ? masks.room<uint8_t>(width + 16 * LANES) : nullptr;
    widen(a.bias, a.hidden, bias), widen(a.gamma, a.hidden, gamma), widen(a.beta, a.hidden, beta);
    for (int64_t token = first; token < end; ++token) {
      if (bytes) hidden_bytes(a.dropout, token, a.hidden, bytes);
      add(row<X>(a.x, token), row<R>(a.residual, token), bias, bytes, a.dropout.threshold, a.hidden, z);
      a.rstd[token] = normalise(z, a.hidden, a.eps, &a.mean[token]);
      store_affine(z, gamma, beta, a.hidden, row<R>(a.y, token));
    }
  });
}

template <class X, class R>
static void backward(const AddLayerNormBackward& a) {
  const int64_t width = padded(a.hidden);
  sum_over_rows(a.tokens, 3, a.hidden, a.sums, [&](int64_t first, int64_t end, float* sums) {
    thread_local Scratch floats, masks;
    float* const bias = floats.room<float>(4 * width);
    float *const gamma = bias + width, *const z = gamma + width, *const d_z = z + width;
    uint8_t* const bytes = a.dropout.threshold ? masks.room<uint8_t>(width + 16 * LANES) : nullptr;
    widen(a.bias, a.hidden, bias), widen(a.gamma, a.hidden, gamma);
    for (int64_t token = first; token < end; ++token) {
      if (bytes) hidden_bytes(a.dropout, token, a.hidden, bytes);
      add(row<X>(a.x, token), row<R>(a.residual, token), bias, bytes, a.dropout.threshold, a.hidden, z);
      differentiate_layer_norm(row<R>(a.d_y, token), z, gamma, a.mean[token], a.rstd[token], a.hidden, d_z, sums,
                               sums + width);
      R* const d_residual = row<R>(a.d_residual, token);
      X* const d_x = row<X>(a.d_x, token);
      across(a.hidden, [&](int64_t column, int count) {
        Floats d = load(d_z + column);
        store_columns(d_residual + column, d, count);
        if (bytes) d *= factors(bytes + column, a.dropout.threshold);
        if (a.d_x.data) store_columns(d_x + column, d, count);
        store(sums + 2 * width + column, load(sums + 2 * width + column) + d);
      });
    }
  });
}

void add_layer_norm_forward(const AddLayerNormForward& a) {
  with_types(a.x.type, a.residual.type, [&]<class X, class R>(X, R) { forward<X, R>(a); });
}

void add_layer_norm_backward(const AddLayerNormBackward& a) {
  with_types(a.x.type, a.residual.type, [&]<class X, class R>(X, R) { backward<X, R>(a); });
}

}  // namespace bertfast::BERTFAST_SET
