#include "../add_layer_norm.h"

#include "kernels.h"
#include "philox.cuh"
#include "rows.cuh"

namespace bertfast::cuda {

// Bits of the columns of a row that dropout keeps; see HiddenMask.
template <class Team>
using Kept = uint32_t[Team::CHUNKS];

// z = residual + dropout(x + bias), with an explicit fma, so that both passes get bitwise identical results.
template <class Team>
DEVICE void add(const Team& team, const HiddenMask& mask, const typename Team::Row& bias, typename Team::Row& x,
                const typename Team::Row& residual, Kept<Team>& kept) {
  UNROLL_FOR (int i = 0; i < Team::CHUNKS; ++i) {
    if (mask.drops()) {
      kept[i] = mask.kept(team.column(i));
      UNROLL_FOR (int j = 0; j < 8; ++j) x[i][j] = fmaf(x[i][j] + bias[i][j], mask.factor(kept[i], j), residual[i][j]);
    } else {
      UNROLL_FOR (int j = 0; j < 8; ++j) x[i][j] = x[i][j] + bias[i][j] + residual[i][j];
    }
  }
}

// Write y, rounded to 16 bits, to its row of the copy.
template <class Team>
DEVICE void store_copy(const Team& team, const Rows& copy, int64_t token, const typename Team::Row& y) {
  if (copy.type == Type::bfloat16) team.store(row<BFloat16>(copy, token), y);
  else team.store(row<Half>(copy, token), y);
}

// Add a row of 16-bit elements to d, one chunk at a time: a whole row would take more registers.
template <class C, class Team>
DEVICE void add_row(const Team& team, const C* row, typename Team::Row& d) {
  UNROLL_FOR (int i = 0; i < Team::CHUNKS; ++i) {
    float x[8];
    team.load_chunk(row, i, x);
    UNROLL_FOR (int j = 0; j < 8; ++j) d[i][j] += x[j];
  }
}

// Add the gradient of the copy of y, if there is one.
template <class Team>
DEVICE void add_copy(const Team& team, const Rows& d_copy, int64_t token, typename Team::Row& d) {
  if (d_copy.data == nullptr) return;
  if (d_copy.type == Type::bfloat16) add_row(team, row<BFloat16>(d_copy, token), d);
  else add_row(team, row<Half>(d_copy, token), d);
}

// The inputs of a row of a backward pass as they are in memory. The gradient of y is zero if it is absent.
template <class X, class R, class Team>
struct BackwardInputs {
  // Whether a thread loads those of its next row before it computes one. In fp32 they take too many registers.
  static constexpr bool ahead = sizeof(R) == 2;

  typename Team::template LoadedRow<X> x;
  typename Team::template LoadedRow<R> residual, d_y = {};
  float mean, rstd;

  DEVICE void load(const Team& team, const AddLayerNormBackward& a, int64_t token) {
    team.load(row<X>(a.x, token), x), team.load(row<R>(a.residual, token), residual);
    if (a.d_y.data != nullptr) team.load(row<R>(a.d_y, token), d_y);
    mean = a.mean[token], rstd = a.rstd[token];
  }
};

template <class X, class R, class Shape>
__global__ void __launch_bounds__(Shape::Team::BLOCK, Shape::Team::FORWARD_BLOCKS_PER_SM)
    add_layer_norm_forward_kernel(const AddLayerNormForward a) {
  const typename Shape::Team team((int)a.hidden);
  typename Shape::Team::Row bias, gamma, beta, z, residual;
  team.load(a.bias, bias), team.load(a.gamma, gamma, 1), team.load(a.beta, beta);
  for (int64_t token = team.first_row(); token < a.tokens; token += team.step()) {
    team.load(row<X>(a.x, token), z);
    team.load(row<R>(a.residual, token), residual);
    Kept<typename Shape::Team> kept;
    add(team, HiddenMask(a.dropout, token), bias, z, residual, kept);
    float mean, rstd;
    team.normalise(z, a.eps, mean, rstd);
    team.scale_and_shift(z, gamma, beta);
    team.store(row<R>(a.y, token), z);
    if (a.copy.data != nullptr) store_copy(team, a.copy, token, z);
    if (team.column(0) == 0) a.mean[token] = mean, a.rstd[token] = rstd;
  }
}

template <class X, class R, class Shape>
__global__ void __launch_bounds__(Shape::Team::BLOCK, Shape::Team::BACKWARD_BLOCKS_PER_SM)
    add_layer_norm_backward_kernel(const AddLayerNormBackward a) {
  const typename Shape::Team team((int)a.hidden);
  typename Shape::Team::Row bias, gamma, z, residual, d_y, d_gamma = {}, d_beta = {}, d_bias = {};
  team.load(a.bias, bias), team.load(a.gamma, gamma);
  BackwardInputs<X, R, typename Shape::Team> inputs;
  int64_t token = team.first_row();
  if (inputs.ahead && token < a.tokens) inputs.load(team, a, token);
  while (token < a.tokens) {
    if (!inputs.ahead) inputs.load(team, a, token);
    team.widen(inputs.x, z), team.widen(inputs.residual, residual), team.widen(inputs.d_y, d_y);
    const HiddenMask mask(a.dropout, token);
    const float mean = inputs.mean, rstd = inputs.rstd;
    const int64_t following = token + team.step();
    if (inputs.ahead && following < a.tokens) inputs.load(team, a, following);
    add_copy(team, a.d_copy, token, d_y);
    Kept<typename Shape::Team> kept;
    add(team, mask, bias, z, residual, kept);
    team.differentiate(z, d_y, gamma, mean, rstd, d_gamma, d_beta);
    team.store(row<R>(a.d_residual, token), z);
    UNROLL_FOR (int i = 0; i < Shape::Team::CHUNKS; ++i)
      UNROLL_FOR (int j = 0; j < 8; ++j) {
        if (mask.drops()) z[i][j] *= mask.factor(kept[i], j);
        d_bias[i][j] += z[i][j];  // beyond the row's end, too, where it is not stored
      }
    if (a.d_x.data != nullptr) team.store(row<X>(a.d_x, token), z);
    token = following;
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
