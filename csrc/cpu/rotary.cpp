#include "../rotary.h"

#include "rows.h"

namespace bertfast::BERTFAST_SET {

template <class T>
static void rotate(const Rotary& a) {
  const int64_t half = a.head_dim / 2, values = 2 * a.heads * a.head_dim;  // the first element of the values
  const float sign = a.inverse ? -1 : 1;
  parallel(a.tokens, 16, [&](int64_t first, int64_t end) {
    for (int64_t token = first; token < end; ++token) {
      const T* const x = row<T>(a.x, token);
      T* const y = row<T>(a.y, token);
      const float* const cosines = row<float>(a.table, token);
      for (int64_t head = 0; head < values; head += a.head_dim)
        for_each_vector(half, [&](int64_t column, int count) {
          const Floats cosine = load_columns(cosines + column, count);
          const Floats sine = load_columns(cosines + half + column, count) * sign;
          const int64_t i = head + column;
          const Floats u = load_columns(x + i, count), v = load_columns(x + i + half, count);
          store_columns(y + i, u * cosine - v * sine, count);
          store_columns(y + i + half, v * cosine + u * sine, count);
        });
      std::memcpy(y + values, x + values, a.heads * a.head_dim * sizeof(T));
    }
  });
}

void rotary(const Rotary& a) {
  with_type(a.x.type, [&]<class T>(T) { rotate<T>(a); });
}

}  // namespace bertfast::BERTFAST_SET
