// LayerNorm over rows that stay in registers. A row belongs to a team of WARPS warps, whose threads hold COUNT chunks
// of 8 columns each; teams iterate over the rows. The sums over rows of a backward pass stay in registers too, which is
// what limits COUNT.
#pragma once
#include "load_store.cuh"

namespace bertfast::cuda {

constexpr int ROW_THREADS = 128;   // of a block, unless a team has more
constexpr int MAX_COLUMNS = 4096;  // of a row

template <int WARPS, int COUNT, bool ALIGNED>  // see load_8
class Team {
 public:
  static constexpr int THREADS = 32 * WARPS, TEAMS = THREADS < ROW_THREADS ? ROW_THREADS / THREADS : 1;
  static constexpr int BLOCK = TEAMS * THREADS;
  // Limited by registers: of a forward pass 72 per thread, of a backward pass, which has sums over rows, 128.
  static constexpr int FORWARD_BLOCKS_PER_SM = COUNT == 1 ? 896 / BLOCK : 1;
  static constexpr int BACKWARD_BLOCKS_PER_SM = COUNT == 1 ? 512 / BLOCK : 1;
  static constexpr int CHUNKS = COUNT;
  using Row = float[COUNT][8];
  template <class T>
  using LoadedRow = Eight<T>[COUNT];

  DEVICE Team(int columns)
      : columns_(columns), thread_((int)threadIdx.x % THREADS), per_column_(1.f / (float)columns) {}

  DEVICE int64_t first_row() const { return (int64_t)blockIdx.x * TEAMS + threadIdx.x / THREADS; }
  DEVICE int64_t step() const { return (int64_t)gridDim.x * TEAMS; }
  DEVICE int column(int i) const { return (i * THREADS + thread_) * 8; }
  DEVICE bool has_column(int i, int j) const { return column(i) + (ALIGNED ? 0 : j) < columns_; }

  template <class T>
  DEVICE void load_chunk(const T* row, int i, float (&x)[8]) const {
    load_8<ALIGNED>(row, column(i), columns_, x);
  }
  template <class T>
  DEVICE void load(const T* row, Row& x) const {
    UNROLL_FOR (int i = 0; i < COUNT; ++i) load_chunk(row, i, x[i]);
  }
  template <class T>
  DEVICE void load(const T* row, Eight<T> (&x)[COUNT]) const {
    UNROLL_FOR (int i = 0; i < COUNT; ++i) x[i] = load_8<ALIGNED>(row, column(i), columns_);
  }
  template <class T>
  DEVICE void widen(const Eight<T> (&from)[COUNT], Row& x) const {
    UNROLL_FOR (int i = 0; i < COUNT; ++i) cuda::widen(from[i], x[i]);
  }
  template <class T>
  DEVICE void store(T* row, const Row& x) const {
    UNROLL_FOR (int i = 0; i < COUNT; ++i) store_8<ALIGNED>(row, column(i), columns_, x[i]);
  }

  // Load a vector; an absent one is filled with `missing`.
  DEVICE void load(Vector from, Row& x, float missing = 0) const {
    UNROLL_FOR (int i = 0; i < COUNT; ++i)
      UNROLL_FOR (int j = 0; j < 8; ++j)
        x[i][j] = from.data && has_column(i, j) ? cuda::widen(from, column(i) + j) : missing;
  }

  // Replace each value, of which there are at most two, by its sum over the team, in all of its threads.
  template <class... Values>
  DEVICE void reduce_sum(Values&... values) const {
    UNROLL_FOR (int lanes = 16; lanes > 0; lanes /= 2) ((values += __shfl_xor_sync(~0u, values, lanes)), ...);
    if constexpr (WARPS > 1) {
      static_assert(TEAMS == 1, "a team of several warps uses the block's barrier");
      SHARED_ARRAY(float, parts, 2 * WARPS);
      __syncthreads();  // the previous call's parts have been read
      int at = 0;
      if (threadIdx.x % 32 == 0) ((parts[at++ * WARPS + threadIdx.x / 32] = values), ...);
      __syncthreads();
      const float* part = parts;
      const auto add = [&](float& value) {
        value = 0;
        UNROLL_FOR (int i = 0; i < WARPS; ++i) value += part[i];
        part += WARPS;
      };
      (add(values), ...);
    }
  }

  // z = (z - mean) · rstd; the variance is computed from differences, in a second pass over registers.
  DEVICE void normalise(Row& z, float eps, float& mean, float& rstd) const {
    float sum = 0, squares = 0;
    UNROLL_FOR (int i = 0; i < COUNT; ++i)
      UNROLL_FOR (int j = 0; j < 8; ++j) sum += z[i][j];  // columns beyond the row's end are 0
    reduce_sum(sum);
    mean = sum * per_column_;
    UNROLL_FOR (int i = 0; i < COUNT; ++i)
      UNROLL_FOR (int j = 0; j < 8; ++j) {
        const float d = z[i][j] - mean;
        squares += has_column(i, j) ? d * d : 0.f;
      }
    reduce_sum(squares);
    rstd = fast_rsqrt(squares * per_column_ + eps);
    UNROLL_FOR (int i = 0; i < COUNT; ++i)
      UNROLL_FOR (int j = 0; j < 8; ++j) z[i][j] = (z[i][j] - mean) * rstd;
  }

  DEVICE void scale_and_shift(Row& z, const Row& gamma, const Row& beta) const {
    UNROLL_FOR (int i = 0; i < COUNT; ++i)
      UNROLL_FOR (int j = 0; j < 8; ++j) z[i][j] = z[i][j] * gamma[i][j] + beta[i][j];
  }

  // Gradient of y = LN(z): z becomes d_z, and d_gamma and d_beta accumulate. With n the normalised z and g = d_y ·
  // gamma, d_z = rstd · (g - mean(g) - n · mean(g · n)).
  DEVICE void differentiate(Row& z, const Row& d_y, const Row& gamma, float mean, float rstd, Row& d_gamma,
                            Row& d_beta) const {
    float mean_g = 0, mean_gz = 0;
    UNROLL_FOR (int i = 0; i < COUNT; ++i)
      UNROLL_FOR (int j = 0; j < 8; ++j) {
        z[i][j] = (z[i][j] - mean) * rstd;
        const float d = d_y[i][j] * gamma[i][j];  // 0 beyond the row's end
        mean_g += d, mean_gz += d * z[i][j];
        d_gamma[i][j] += d_y[i][j] * z[i][j], d_beta[i][j] += d_y[i][j];
      }
    reduce_sum(mean_g, mean_gz);
    mean_g *= per_column_, mean_gz *= per_column_;
    UNROLL_FOR (int i = 0; i < COUNT; ++i)
      UNROLL_FOR (int j = 0; j < 8; ++j) z[i][j] = rstd * (d_y[i][j] * gamma[i][j] - mean_g - z[i][j] * mean_gz);
  }

  // Write the sum of x over the block's teams, added one after another, to out [columns].
  DEVICE void store_block_sum(Row& x, float* out) const {
    if constexpr (TEAMS > 1) {
      SHARED_ARRAY(float, total, COUNT * THREADS * 8);
      for (int team = 0; team < TEAMS; ++team) {
        __syncthreads();
        if ((int)threadIdx.x / THREADS != team) continue;
        UNROLL_FOR (int i = 0; i < COUNT; ++i)
          UNROLL_FOR (int j = 0; j < 8; ++j) {
            float& sum = total[column(i) + j];
            sum = x[i][j] += team == 0 ? 0.f : sum;
          }
      }
      if ((int)threadIdx.x / THREADS != TEAMS - 1) return;
    }
    UNROLL_FOR (int i = 0; i < COUNT; ++i) store_8<false>(out, column(i), columns_, x[i]);
  }

 private:
  const int columns_, thread_;
  const float per_column_;
};

template <int WARPS, int COUNT, bool ALIGNED>
struct RowShape {
  using Team = cuda::Team<WARPS, COUNT, ALIGNED>;
};

// Call f with the smallest RowShape that holds a row; `aligned` says whether all rows are ALIGNED.
template <class F>
void with_row_shape(int64_t columns, bool aligned, const F& f) {
  if (columns > MAX_COLUMNS) throw std::runtime_error("rows have at most 4096 columns");
  if (!aligned) return f(RowShape<8, 2, false>{});
  if (columns <= 256) return f(RowShape<1, 1, true>{});
  if (columns <= 768) return f(RowShape<3, 1, true>{});
  if (columns <= 1024) return f(RowShape<4, 1, true>{});
  f(RowShape<8, 2, true>{});
}

// As many blocks as are resident on the GPU, or fewer if there are fewer rows.
template <class Shape>
int row_blocks(int64_t rows, Shape, int blocks_per_sm) {
  const int64_t needed = (rows + Shape::Team::TEAMS - 1) / Shape::Team::TEAMS;
  const int64_t resident = (int64_t)sm_count() * blocks_per_sm;
  return (int)(needed < 1 ? 1 : needed < resident ? needed : resident);
}

// The number of blocks of a forward pass.
template <class Shape>
int forward_blocks(int64_t rows, Shape shape) {
  return row_blocks(rows, shape, Shape::Team::FORWARD_BLOCKS_PER_SM);
}

// The number of blocks of a backward pass, each of which writes its own partial sums.
inline int backward_blocks(int64_t rows, int64_t columns) {
  int blocks = 1;
  with_row_shape(columns, true, [&]<class Shape>(Shape shape) {
    blocks = row_blocks(rows, shape, Shape::Team::BACKWARD_BLOCKS_PER_SM);
  });
  return blocks;
}

}  // namespace bertfast::cuda
