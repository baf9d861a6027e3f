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
  const auto rows = [&](int64_t first, int64_t end) {
    thread_local Scratch floats, masks;
    float* const bias = floats.room<float>(4 * width);
    float *const gamma = bias + width, *const beta = gamma + width, *const z = beta + width;
    uint8_t* const bytes = a.dropout.threshold ? masks.room<uint8_t>(width + 16 * LANES) : nullptr;
    widen(a.bias, a.hidden, bias), widen(a.gamma, a.hidden, gamma), widen(a.beta, a.hidden, beta);
    for (int64_t token = first; token < end; ++token) {
      if (bytes) hidden_bytes(a.dropout, token, a.hidden, bytes);
      add((const X*)a.x.data + token * a.x.stride, (const R*)a.residual.data + token * a.residual.stride, bias, bytes,
          a.dropout.threshold, a.hidden, z);
      a.rstd[token] = normalise(z, a.hidden, a.eps, &a.mean[token]);
      R* const y = (R*)a.y.data + token * a.y.stride;
      across(a.hidden, [&](int64_t column, int count) {
        store_columns(y + column, load(z + column) * load(gamma + column) + load(beta + column), count);
      });
    }
  };
  parallel(a.tokens, 16, rows);
}

template <class X, class R>
static void backward(const AddLayerNormBackward& a) {
  const int64_t width = padded(a.hidden), slots = summing_slots(a.tokens);
  static thread_local Scratch shared;
  float* const shares = shared.room<float>(slots * 3 * a.hidden);
  parallel(slots, 1, [&](int64_t first, int64_t end) {
    thread_local Scratch floats, masks;
    float* const bias = floats.room<float>(7 * width);
    float *const gamma = bias + width, *const z = gamma + width, *const d_z = z + width;
    float* const sums[3] = {d_z + width, d_z + 2 * width, d_z + 3 * width};  // of d_gamma, d_beta and d_bias
    uint8_t* const bytes = a.dropout.threshold ? masks.room<uint8_t>(width + 16 * LANES) : nullptr;
    widen(a.bias, a.hidden, bias), widen(a.gamma, a.hidden, gamma);
    for (int64_t slot = first; slot < end; ++slot) {
      std::memset(sums[0], 0, 3 * width * sizeof(float));
      for (int64_t token = a.tokens * slot / slots; token < a.tokens * (slot + 1) / slots; ++token) {
        if (bytes) hidden_bytes(a.dropout, token, a.hidden, bytes);
        add((const X*)a.x.data + token * a.x.stride, (const R*)a.residual.data + token * a.residual.stride, bias, bytes,
            a.dropout.threshold, a.hidden, z);
        const R* const d_y = (const R*)a.d_y.data + token * a.d_y.stride;
        differentiate_layer_norm(d_y, z, gamma, a.mean[token], a.rstd[token], a.hidden, d_z, sums[0], sums[1]);
        R* const d_residual = (R*)a.d_residual.data + token * a.d_residual.stride;
        X* const d_x = (X*)a.d_x.data + token * a.d_x.stride;
        across(a.hidden, [&](int64_t column, int count) {
          Floats d = load(d_z + column);
          store_columns(d_residual + column, d, count);
          if (bytes) d *= factors(bytes + column, a.dropout.threshold);
          if (a.d_x.data) store_columns(d_x + column, d, count);
          store(sums[2] + column, load(sums[2] + column) + d);
        });
      }
      for (int i = 0; i < 3; ++i)
        std::memcpy(shares + (slot * 3 + i) * a.hidden, sums[i], a.hidden * sizeof(float));
    }
  });
  add_slots(shares, slots, 3 * a.hidden, a.sums);
}

void add_layer_norm_forward(const AddLayerNormForward& a) {
  with_types(a.x.type, a.residual.type, [&]<class X, class R>(X, R) { forward<X, R>(a); });
}

void add_layer_norm_backward(const AddLayerNormBackward& a) {
  with_types(a.x.type, a.residual.type, [&]<class X, class R>(X, R) { backward<X, R>(a); });
}

}  // namespace bertfast::BERTFAST_SET
