// LayerNorm over rows that stay in registers. A row is a team's, of WARPS warps, whose threads hold 8 columns of each of
// COUNT stretches of it; teams take rows in turn until none is left. What a backward pass sums up over rows stays in
// registers too, which is what bounds COUNT.
#pragma once
#include "numbers.cuh"

namespace bertfast::cuda {

constexpr int ROW_THREADS = 128;  // of a block, unless a team has more
constexpr int WIDEST = 4096;    // columns of a row

template <int WARPS, int COUNT>
class Team {
 public:
  static constexpr int THREADS = 32 * WARPS, TEAMS = THREADS < ROW_THREADS ? ROW_THREADS / THREADS : 1;
  static constexpr int BLOCK = TEAMS * THREADS;
  static constexpr int RESIDENT = COUNT == 1 ? 512 / BLOCK : 1;  // blocks that a multiprocessor has registers for
  static constexpr int STRETCHES = COUNT;
  using Row = float[COUNT][8];

  DEVICE Team(int columns) : columns_(columns), thread_((int)threadIdx.x % THREADS) {}

  DEVICE int64_t first_row() const { return (int64_t)blockIdx.x * TEAMS + threadIdx.x / THREADS; }
  DEVICE int64_t step() const { return (int64_t)gridDim.x * TEAMS; }
  DEVICE int column(int i) const { return (i * THREADS + thread_) * 8; }
  DEVICE int columns() const { return columns_; }
  DEVICE bool has(int i, int j) const { return column(i) + j < columns_; }

  template <bool WHOLE, class T>
  DEVICE void load(const T* row, Row& x) const {
    UNROLL for (int i = 0; i < COUNT; ++i) load_8<WHOLE>(row, column(i), columns_, x[i]);
  }
  template <bool WHOLE, class T>
  DEVICE void store(T* row, const Row& x) const {
    UNROLL for (int i = 0; i < COUNT; ++i) store_8<WHOLE>(row, column(i), columns_, x[i]);
  }

  // A vector's numbers, those of a vector that is not there `missing`.
  DEVICE void load(Vector from, Row& x, float missing = 0) const {
    UNROLL for (int i = 0; i < COUNT; ++i)
      UNROLL for (int j = 0; j < 8; ++j) x[i][j] = from.data && has(i, j) ? widen(from, column(i) + j) : missing;
  }

  // The sums of x and y over the team, in every thread of it.
  DEVICE void add_up(float& x, float& y) const {
    UNROLL for (int lanes = 16; lanes > 0; lanes /= 2) {
      x += __shfl_xor_sync(~0u, x, lanes);
      y += __shfl_xor_sync(~0u, y, lanes);
    }
    if constexpr (WARPS > 1) {
      SHARED_ARRAY(float2, parts, BLOCK / 32);
      const int warp = (int)threadIdx.x / 32, team = warp / WARPS;
      meet(1 + team, THREADS);  // the parts of the last time have been read
      if (threadIdx.x % 32 == 0) parts[warp] = {x, y};
      meet(1 + team, THREADS);
      x = y = 0;
      UNROLL for (int i = 0; i < WARPS; ++i) x += parts[team * WARPS + i].x, y += parts[team * WARPS + i].y;
    }
  }

  // z becomes (z - mean) / deviation.
  DEVICE void normalise(Row& z, float eps, float& mean, float& rstd) const {
    float sum = 0, squares = 0, nothing = 0;
    UNROLL for (int i = 0; i < COUNT; ++i)
      UNROLL for (int j = 0; j < 8; ++j) sum += z[i][j];  // columns that are not there are 0
    add_up(sum, nothing);
    mean = sum / (float)columns_;
    UNROLL for (int i = 0; i < COUNT; ++i)
      UNROLL for (int j = 0; j < 8; ++j) {
        const float d = has(i, j) ? z[i][j] - mean : 0.f;
        squares += d * d;
      }
    add_up(squares, nothing);
    rstd = 1.f / sqrtf(squares / (float)columns_ + eps);
    UNROLL for (int i = 0; i < COUNT; ++i)
      UNROLL for (int j = 0; j < 8; ++j) z[i][j] = (z[i][j] - mean) * rstd;
  }

  DEVICE void scale_and_shift(Row& z, const Row& gamma, const Row& beta) const {
    UNROLL for (int i = 0; i < COUNT; ++i)
      UNROLL for (int j = 0; j < 8; ++j) z[i][j] = z[i][j] * gamma[i][j] + beta[i][j];
  }

  // Of y = z' gamma + beta, z' the normalised z, which becomes z's gradient; gamma's and beta's are added to theirs.
  DEVICE void differentiate(Row& z, const Row& d_y, const Row& gamma, float mean, float rstd, Row& d_gamma,
                            Row& d_beta) const {
    float along_1 = 0, along_z = 0;
    UNROLL for (int i = 0; i < COUNT; ++i)
      UNROLL for (int j = 0; j < 8; ++j) {
        z[i][j] = (z[i][j] - mean) * rstd;
        const float d = d_y[i][j] * gamma[i][j];  // 0 where there is no column
        along_1 += d, along_z += d * z[i][j];
        d_gamma[i][j] += d_y[i][j] * z[i][j], d_beta[i][j] += d_y[i][j];
      }
    add_up(along_1, along_z);
    along_1 /= (float)columns_, along_z /= (float)columns_;
    UNROLL for (int i = 0; i < COUNT; ++i)
      UNROLL for (int j = 0; j < 8; ++j) z[i][j] = rstd * (d_y[i][j] * gamma[i][j] - along_1 - z[i][j] * along_z);
  }

  // Writes the block's sum of x to out [columns], its teams one after another.
  DEVICE void sum_of_block(Row& x, float* out) const {
    if constexpr (TEAMS > 1) {
      SHARED_ARRAY(float, total, COUNT * THREADS * 8);
      for (int team = 0; team < TEAMS; ++team) {
        __syncthreads();
        if ((int)threadIdx.x / THREADS != team) continue;
        UNROLL for (int i = 0; i < COUNT; ++i)
          UNROLL for (int j = 0; j < 8; ++j) {
            float& place = total[column(i) + j];
            place = x[i][j] += team == 0 ? 0.f : place;
          }
      }
      if ((int)threadIdx.x / THREADS != TEAMS - 1) return;
    }
    UNROLL for (int i = 0; i < COUNT; ++i) store_8<false>(out, column(i), columns_, x[i]);
  }

 private:
  const int columns_, thread_;
};

template <int WARPS, int COUNT, bool WHOLE>
struct RowShape {
  using Team = cuda::Team<WARPS, COUNT>;
  static constexpr bool whole = WHOLE;  // see load_8
};

// f(the smallest RowShape that holds a row); `whole` says whether all rows are.
template <class F>
void with_shape(int64_t columns, bool whole, const F& f) {
  if (columns > WIDEST) throw std::runtime_error("rows have at most 4096 columns");
  if (!whole) return f(RowShape<8, 2, false>{});
  if (columns <= 256) return f(RowShape<1, 1, true>{});
  if (columns <= 768) return f(RowShape<3, 1, true>{});
  if (columns <= 1024) return f(RowShape<4, 1, true>{});
  f(RowShape<8, 2, true>{});
}

// As many blocks as stay on the GPU, or fewer if these have no rows.
template <class Shape>
int row_blocks(int64_t rows, Shape) {
  const int64_t enough = (rows + Shape::Team::TEAMS - 1) / Shape::Team::TEAMS;
  const int64_t most = (int64_t)multiprocessors() * Shape::Team::RESIDENT;
  return (int)(enough < 1 ? 1 : enough < most ? enough : most);
}

// The blocks of a backward pass, each of which writes its own sums.
inline int backward_blocks(int64_t rows, int64_t columns) {
  int blocks = 1;
  with_shape(columns, true, [&](auto shape) { blocks = row_blocks(rows, shape); });
  return blocks;
}

}  // namespace bertfast::cuda
