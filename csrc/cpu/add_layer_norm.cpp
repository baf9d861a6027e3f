#include "../add_layer_norm.h"

#include "dropout.h"
#include "rows.h"

namespace bertfast::BERTFAST_SET {

template <class X, class R>
static void forward(const AddLayerNormForward& a) {
  parallel(a.tokens, 16, [&](int64_t first, int64_t end) {
    thread_local Scratch floats, bytes;
    HiddenMask mask(a.dropout, a.hidden, bytes);
    const int64_t width = padded(a.hidden);
    float* const bias = floats.reserve<float>(4 * width);
    float *const gamma = bias + width, *const beta = gamma + width, *const z = beta + width;
    widen(a.bias, a.hidden, bias), widen(a.gamma, a.hidden, gamma), widen(a.beta, a.hidden, beta);
    for (int64_t token = first; token < end; ++token) {
      const X* const x = row<X>(a.x, token);
      const R* const residual = row<R>(a.residual, token);
      R* const y = row<R>(a.y, token);
      BFloat16* const copy = a.copy.data ? row<BFloat16>(a.copy, token) : nullptr;
      mask.draw(token);
      const LayerNorm norm = statistics(a.hidden, a.eps, z, [&](int64_t column, int count) {
        const Floats sum = load_columns(x + column, count) + load(bias + column);
        return mask.add(column, sum, load_columns(residual + column, count));
      });
      for_each_vector(a.hidden, [&](int64_t column, int count) {
        const Floats out = norm(load(z + column)) * load(gamma + column) + load(beta + column);
        store_columns(y + column, out, count);
        if (copy) store_columns(copy + column, out, count);
      });
      a.mean[token] = norm.mean, a.rstd[token] = norm.rstd;
    }
  });
}

template <class X, class R>
static void backward(const AddLayerNormBackward& a) {
  const int64_t width = padded(a.hidden);
  sum_over_rows<3>(a.tokens, a.hidden, a.sums, [&](int64_t first, int64_t end, float* sums) {
    thread_local Scratch floats, bytes;
    HiddenMask mask(a.dropout, a.hidden, bytes);
    float* const bias = floats.reserve<float>(4 * width);
    float *const gamma = bias + width, *const reserve = gamma + width;
    widen(a.bias, a.hidden, bias), widen(a.gamma, a.hidden, gamma);
    for (int64_t token = first; token < end; ++token) {
      const X* const x = row<X>(a.x, token);
      const R* const residual = row<R>(a.residual, token);
      const R* const d_y = a.d_y.data ? row<R>(a.d_y, token) : nullptr;
      const BFloat16* const d_copy = a.d_copy.data ? row<BFloat16>(a.d_copy, token) : nullptr;
      X* const d_x = a.d_x.data ? row<X>(a.d_x, token) : nullptr;
      R* const d_residual = row<R>(a.d_residual, token);
      mask.draw(token);
      differentiate(
          LayerNorm{a.mean[token], a.rstd[token]}, a.hidden, gamma, sums, sums + width, reserve,
          [&](int64_t column, int count) {
            const Floats sum = load_columns(x + column, count) + load(bias + column);
            return mask.add(column, sum, load_columns(residual + column, count));
          },
          [&](int64_t column, int count) {
            Floats d = d_y ? load_columns(d_y + column, count) : Floats{};
            if (d_copy) d += load_columns(d_copy + column, count);
            return d;
          },
          [&](int64_t column, int count, Floats d_z) {
            store_columns(d_residual + column, d_z, count);
            // The next row: what the CPU fetches by itself lags behind, because passes over a row alternate. A prefetch
            // of an address beyond the tensor does nothing.
            __builtin_prefetch(x + a.x.stride + column), __builtin_prefetch(residual + a.residual.stride + column);
            if (d_y) __builtin_prefetch(d_y + a.d_y.stride + column);
            if (d_copy) __builtin_prefetch(d_copy + a.d_copy.stride + column);
            const Floats d = mask(column, d_z);
            if (d_x) store_columns(d_x + column, d, count);
            add_to(sums + 2 * width + column, d);
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
