#include "../gelu_layer_norm.h"

#include "gelu.cuh"
#include "kernels.h"
#include "rows.cuh"

namespace bertfast::cuda {

template <class X, class Y, class Shape>
__global__ void __launch_bounds__(Shape::Team::BLOCK, Shape::Team::FORWARD_BLOCKS_PER_SM)
    gelu_layer_norm_forward_kernel(const GeluLayerNormForward a) {
  const typename Shape::Team team((int)a.hidden);
  typename Shape::Team::Row bias, gamma, beta, z;
  team.load(a.bias, bias), team.load(a.gamma, gamma), team.load(a.beta, beta);
  for (int64_t token = team.first_row(); token < a.count; token += team.step()) {
    team.load(row<X>(a.x, token), z);
    UNROLL_FOR (int i = 0; i < Shape::Team::CHUNKS; ++i)
      UNROLL_FOR (int j = 0; j < 8; ++j) z[i][j] = gelu<false>(z[i][j] + bias[i][j]).value;
    float mean, rstd;
    team.normalise(z, a.eps, mean, rstd);
    team.scale_and_shift(z, gamma, beta);
    team.store(row<Y>(a.y, token), z);
    if (team.column(0) == 0) a.mean[token] = mean, a.rstd[token] = rstd;
  }
}

template <class X, class Y, class Shape>
__global__ void __launch_bounds__(Shape::Team::BLOCK, Shape::Team::BACKWARD_BLOCKS_PER_SM)
    gelu_layer_norm_backward_kernel(const GeluLayerNormBackward a) {
  const typename Shape::Team team((int)a.hidden);
  typename Shape::Team::Row bias, gamma, z, slope, d_y, d_gamma = {}, d_beta = {}, d_bias = {};
  team.load(a.bias, bias), team.load(a.gamma, gamma);
  for (int64_t token = team.first_row(); token < a.count; token += team.step()) {
    team.load(row<X>(a.x, token), z);
    team.load(row<Y>(a.d_y, token), d_y);
    UNROLL_FOR (int i = 0; i < Shape::Team::CHUNKS; ++i)
      UNROLL_FOR (int j = 0; j < 8; ++j) {
        const Curve curve = gelu<false>(z[i][j] + bias[i][j]);
        z[i][j] = curve.value, slope[i][j] = curve.slope;
      }
    team.differentiate(z, d_y, gamma, a.mean[token], a.rstd[token], d_gamma, d_beta);
    UNROLL_FOR (int i = 0; i < Shape::Team::CHUNKS; ++i)
      UNROLL_FOR (int j = 0; j < 8; ++j) {
        z[i][j] *= slope[i][j];
        d_bias[i][j] += z[i][j];  // beyond the row's end, too, where it is not stored
      }
    team.store(row<X>(a.d_x, token), z);
  }
  float* const sums = a.sums + (int64_t)blockIdx.x * 3 * a.hidden;
  team.store_block_sum(d_gamma, sums);
  team.store_block_sum(d_beta, sums + a.hidden);
  team.store_block_sum(d_bias, sums + 2 * a.hidden);
}

int gelu_layer_norm_parts(int64_t rows, int64_t columns) { return backward_blocks(rows, columns); }

void gelu_layer_norm_forward(const GeluLayerNormForward& a, Stream stream) {
  with_types(a.x.type, a.y.type, [&]<class X, class Y>(X, Y) {
    with_row_shape(a.hidden, is_aligned(a.x, a.hidden) && is_aligned(a.y, a.hidden), [&]<class Shape>(Shape shape) {
      launch(gelu_layer_norm_forward_kernel<X, Y, Shape>, forward_blocks(a.count, shape), Shape::Team::BLOCK, 0, stream,
             a);
    });
  });
}

void gelu_layer_norm_backward(const GeluLayerNormBackward& a, Stream stream) {
  const bool aligned = is_aligned(a.x, a.hidden) && is_aligned(a.d_y, a.hidden) && is_aligned(a.d_x, a.hidden);
  with_types(a.x.type, a.d_y.type, [&]<class X, class Y>(X, Y) {
    with_row_shape(a.hidden, aligned, [&]<class Shape>(Shape) {
      launch(gelu_layer_norm_backward_kernel<X, Y, Shape>, a.parts, Shape::Team::BLOCK, 0, stream, a);
    });
  });
}

}  // namespace bertfast::cuda
