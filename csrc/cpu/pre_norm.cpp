#include "../pre_norm.h"

#include "dropout.h"
#include "rows.h"

namespace bertfast::BERTFAST_SET {

// Types: X of x, R of residual and stream, N of the norm.
template <class X, class R, class N, bool RMS>
static void forward(const PreNormForward& a) {
  parallel(a.tokens, 16, [&](int64_t first, int64_t end) {
    thread_local Scratch floats, bytes;
    HiddenMask mask(a.dropout, a.hidden, bytes);
    const int64_t width = padded(a.hidden);
    float* const bias = floats.reserve<float>(4 * width);
    float *const gamma = bias + width, *const beta = gamma + width, *const z = beta + width;
    widen(a.bias, a.hidden, bias), widen(a.gamma, a.hidden, gamma), widen(a.beta, a.hidden, beta);
    for (int64_t token = first; token < end; ++token) {
      const X* const x = a.x.data ? row<X>(a.x, token) : nullptr;
      const R* const residual = row<R>(a.residual, token);
      R* const stream = x ? row<R>(a.stream, token) : nullptr;
      N* const normed = row<N>(a.normed, token);
      mask.draw(token);
      const LayerNorm norm = statistics<!RMS>(a.hidden, a.eps, z, [&](int64_t column, int count) {
        const Floats rest = load_columns(residual + column, count);
        if (!x) return rest;
        const Floats total = mask.add(column, load_columns(x + column, count) + load(bias + column), rest);
        store_columns(stream + column, total, count);
        return as_stored<R>(total);
      });
      for_each_vector(a.hidden, [&](int64_t column, int count) {
        store_columns(normed + column, norm(load(z + column)) * load(gamma + column) + load(beta + column), count);
      });
      if (!RMS) a.mean[token] = norm.mean;
      a.rstd[token] = norm.rstd;
    }
  });
}

template <class X, class R, class N, bool RMS>
static void backward(const PreNormBackward& a) {
  const int64_t width = padded(a.hidden);
  sum_over_rows<3>(a.tokens, a.hidden, a.sums, [&](int64_t first, int64_t end, float* sums) {
    thread_local Scratch floats, bytes;
    HiddenMask mask(a.dropout, a.hidden, bytes);
    float *const gamma = floats.reserve<float>(3 * width), *const buffer = gamma + width;
    widen(a.gamma, a.hidden, gamma);
    for (int64_t token = first; token < end; ++token) {
      const R* const stream = row<R>(a.stream, token);
      const R* const d_stream = a.d_stream.data ? row<R>(a.d_stream, token) : nullptr;
      const N* const d_normed = a.d_normed.data ? row<N>(a.d_normed, token) : nullptr;
      X* const d_x = a.d_x.data ? row<X>(a.d_x, token) : nullptr;
      R* const d_residual = row<R>(a.d_residual, token);
      mask.draw(token);
      differentiate<!RMS>(
          LayerNorm{RMS ? 0 : a.mean[token], a.rstd[token]}, a.hidden, gamma, sums, sums + width, buffer,
          [&](int64_t column, int count) { return load_columns(stream + column, count); },
          [&](int64_t column, int count) { return d_normed ? load_columns(d_normed + column, count) : Floats{}; },
          [&](int64_t column, int count, Floats d_z) {
            if (d_stream) d_z += load_columns(d_stream + column, count);
            store_columns(d_residual + column, d_z, count);
            if (!d_x && !a.has_bias) return;
            const Floats d = mask(column, d_z);
            if (d_x) store_columns(d_x + column, d, count);
            if (a.has_bias) add_to(sums + 2 * width + column, d);
          });
    }
  });
}

// Call f<X, R, N, RMS>() for the types of x, stream and norm; an absent tensor counts as one of the stream's type.
template <class F>
static void with_norm(const Rows& x, Type stream, const Rows& normed, bool rms, const F& f) {
  with_types(x.data ? x.type : stream, stream, [&]<class X, class R>(X, R) {
    with_type(normed.data ? normed.type : stream, [&]<class N>(N) {
      rms ? f.template operator()<X, R, N, true>() : f.template operator()<X, R, N, false>();
    });
  });
}

void pre_norm_forward(const PreNormForward& a) {
  with_norm(a.x, a.residual.type, a.normed, a.rms,
            [&]<class X, class R, class N, bool RMS>() { forward<X, R, N, RMS>(a); });
}

void pre_norm_backward(const PreNormBackward& a) {
  with_norm(a.d_x, a.stream.type, a.d_normed, a.rms,
            [&]<class X, class R, class N, bool RMS>() { backward<X, R, N, RMS>(a); });
}

}  // namespace bertfast::BERTFAST_SET
