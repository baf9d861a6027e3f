#include "../add_layer_norm.h"

#include "kernels.h"
#include "philox.cuh"
#include "rows.cuh"

namespace bertfast::cuda {

// z = residual + dropout(x + bias), with an explicit fma, so that both passes get bitwise identical results.
template <class Team>
DEVICE void add(const Team& team, const HiddenMask& mask, const typename Team::Row& bias, typename Team::Row& x,
                const typename Team::Row& residual) {
  UNROLL_FOR (int i = 0; i < Team::CHUNKS; ++i) {
    float factor[8] = {1, 1, 1, 1, 1, 1, 1, 1};
    if (mask.drops()) mask.factors(team.column(i), factor);
    UNROLL_FOR (int j = 0; j < 8; ++j) x[i][j] = fmaf(x[i][j] + bias[i][j], factor[j], residual[i][j]);
  }
}

// Write y, rounded to 16 bits, to its row of the copy.
template <bool ALIGNED, class Team>
DEVICE void store_copy(const Team& team, const Rows& copy, int64_t token, const typename Team::Row& y) {
  if (copy.type == Type::bfloat16) team.template store<ALIGNED>(row<BFloat16>(copy, token), y);
  else team.template store<ALIGNED>(row<Half>(copy, token), y);
}

// Add a row of 16-bit elements to d, one chunk at a time: a whole row would take more registers.
template <bool ALIGNED, class C, class Team>
DEVICE void add_row(const Team& team, const C* row, typename Team::Row& d) {
  UNROLL_FOR (int i = 0; i < Team::CHUNKS; ++i) {
    float x[8];
    load_8<ALIGNED>(row, team.column(i), team.columns(), x);
    UNROLL_FOR (int j = 0; j < 8; ++j) d[i][j] += x[j];
  }
}

// Load the sum of the gradients of y and of its copy, either of which may be absent.
template <class R, bool ALIGNED, class Team>
DEVICE void load_gradient(const Team& team, const AddLayerNormBackward& a, int64_t token, typename Team::Row& d) {
  if (a.d_y.data != nullptr) team.template load<ALIGNED>(row<R>(a.d_y, token), d);
  else
    UNROLL_FOR (int i = 0; i < Team::CHUNKS; ++i)
      UNROLL_FOR (int j = 0; j < 8; ++j) d[i][j] = 0;
  if (a.d_copy.data == nullptr) return;
  if (a.d_copy.type == Type::bfloat16) add_row<ALIGNED>(team, row<BFloat16>(a.d_copy, token), d);
  else add_row<ALIGNED>(team, row<Half>(a.d_copy, token), d);
}

template <class X, class R, class Shape>
__global__ void __launch_bounds__(Shape::Team::BLOCK, Shape::Team::FORWARD_BLOCKS_PER_SM)
    add_layer_norm_forward_kernel(const AddLayerNormForward a) {
  const typename Shape::Team team((int)a.hidden);
  typename Shape::Team::Row bias, gamma, beta, z, residual;
  team.load(a.bias, bias), team.load(a.gamma, gamma, 1), team.load(a.beta, beta);
  for (int64_t token = team.first_row(); token < a.tokens; token += team.step()) {
    team.template load<Shape::aligned>(row<X>(a.x, token), z);
    team.template load<Shape::aligned>(row<R>(a.residual, token), residual);
    add(team, HiddenMask(a.dropout, token), bias, z, residual);
    float mean, rstd;
    team.normalise(z, a.eps, mean, rstd);
    team.scale_and_shift(z, gamma, beta);
    team.template store<Shape::aligned>(row<R>(a.y, token), z);
    if (a.copy.data != nullptr) store_copy<Shape::aligned>(team, a.copy, token, z);
    if (team.column(0) == 0) a.mean[token] = mean, a.rstd[token] = rstd;
  }
}

template <class X, class R, class Shape>
__global__ void __launch_bounds__(Shape::Team::BLOCK, Shape::Team::BACKWARD_BLOCKS_PER_SM)
    add_layer_norm_backward_kernel(const AddLayerNormBackward a) {
  const typename Shape::Team team((int)a.hidden);
  typename Shape::Team::Row bias, gamma, z, residual, d_y, d_gamma = {}, d_beta = {}, d_bias = {};
  team.load(a.bias, bias), team.load(a.gamma, gamma);
  for (int64_t token = team.first_row(); token < a.tokens; token += team.step()) {
    team.template load<Shape::aligned>(row<X>(a.x, token), z);
    team.template load<Shape::aligned>(row<R>(a.residual, token), residual);
    load_gradient<R, Shape::aligned>(team, a, token, d_y);
    const HiddenMask mask(a.dropout, token);
    add(team, mask, bias, z, residual);
    team.differentiate(z, d_y, gamma, a.mean[token], a.rstd[token], d_gamma, d_beta);
    team.template store<Shape::aligned>(row<R>(a.d_residual, token), z);
    UNROLL_FOR (int i = 0; i < Shape::Team::CHUNKS; ++i) {
      float factor[8] = {1, 1, 1, 1, 1, 1, 1, 1};
      if (mask.drops()) mask.factors(team.column(i), factor);
      UNROLL_FOR (int j = 0; j < 8; ++j) {
        z[i][j] *= factor[j];
        if (team.has_column(i, j)) d_bias[i][j] += z[i][j];
      }
    }
    if (a.d_x.data != nullptr) team.template store<Shape::aligned>(row<X>(a.d_x, token), z);
  }
  float* const sums = a.sums + (int64_t)blockIdx.x * 3 * a.hidden;
  team.store_block_sum(d_gamma, sums);
  team.store_block_sum(d_beta, sums + a.hidden);
  team.store_block_sum(d_bias, sums + 2 * a.hidden);
}

int add_layer_norm_parts(int64_t rows, int64_t columns) { return backward_blocks(rows, columns); }

void add_layer_norm_forward(const AddLayerNormForward& a, Stream stream) {
  const bool aligned = is_aligned(a.x, a.hidden) && is_aligned(a.residual, a.hidden) && is_aligned(a.y, a.hidden) &&
                       is_aligned(a.copy, a.hidden);
  with_types(a.x.type, a.residual.type, [&]<class X, class R>(X, R) {
    with_row_shape(a.hidden, aligned, [&]<class Shape>(Shape shape) {
      launch(add_layer_norm_forward_kernel<X, R, Shape>, forward_blocks(a.tokens, shape), Shape::Team::BLOCK, 0, stream,
             a);
    });
  });
}

void add_layer_norm_backward(const AddLayerNormBackward& a, Stream stream) {
  const bool aligned = is_aligned(a.x, a.hidden) && is_aligned(a.residual, a.hidden) && is_aligned(a.d_y, a.hidden) &&
                       is_aligned(a.d_copy, a.hidden) && is_aligned(a.d_x, a.hidden) &&
                       is_aligned(a.d_residual, a.hidden);
  with_types(a.x.type, a.residual.type, [&]<class X, class R>(X, R) {
    with_row_shape(a.hidden, aligned, [&]<class Shape>(Shape) {
      launch(add_layer_norm_backward_kernel<X, R, Shape>, a.parts, Shape::Team::BLOCK, 0, stream, a);
    });
  });
}

}  // namespace bertfast::cuda
