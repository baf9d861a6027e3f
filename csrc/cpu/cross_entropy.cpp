#include "cross_entropy.h"

#include "rows.h"

namespace bertfast::BERTFAST_SET {

constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

// A row's loss; with `share` [padded(V)] its logits become their gradient, which is added there.
template <class T>
static void one_row(const CrossEntropy& a, int64_t index, const float* bias, float* share) {
  T* const logits = row<T>(a.logits, index);
  const int64_t label = a.labels[index], whole = a.vocabulary / LANES * LANES;
  const int rest = (int)(a.vocabulary - whole);
  if (label < 0) {
    a.losses[index] = 0, a.correct[index] = false;
    if (share) std::memset(logits, 0, a.vocabulary * sizeof(T));
    return;
  }
  const auto logit = [&](int64_t column) { return load(logits + column) + load(bias + column); };
  // Beyond the end, where nothing must be read, minus infinity.
  const auto last = [&] {
    const Floats some = load(logits + whole, rest) + load(bias + whole);
    return lane_numbers() < splat((uint32_t)rest) ? some : splat(-__builtin_inff());
  };
  Floats peaks[4];
  for (Floats& peak : peaks) peak = rest ? last() : logit(0);
  for (int64_t column = 0; column < whole; column += LANES) {
    Floats& peak = peaks[column / LANES % 4];
    peak = maximum(logit(column), peak);
  }
  const float peak = largest(maximum(maximum(peaks[0], peaks[1]), maximum(peaks[2], peaks[3])));
  const auto exponential = [&](Floats x) { return exp2((x - peak) * LOG2_E); };
  Floats sums[4] = {rest ? exponential(last()) : Floats{}};
  for (int64_t column = 0; column < whole; column += LANES) sums[column / LANES % 4] += exponential(logit(column));
  const float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  const auto one_logit = [&](int64_t column) { return load(logits + column, 1)[0] + bias[column]; };
  const float wanted = label < a.vocabulary ? one_logit(label) : __builtin_nanf("");  // so that the mistake shows
  bool first = wanted == peak;
  for (int64_t column = 0; first && column < label; ++column) first = one_logit(column) != peak;
  a.losses[index] = log2(splat(total))[0] * LN_2 + (peak - wanted), a.correct[index] = first;
  if (!share) return;
  const float scale = 1 / total;
  const auto differentiate = [&](Floats x, int64_t column) {
    const Words lanes = lane_numbers() + (uint32_t)column;
    Floats d = exponential(x) * scale;
    if (label >= column && label < column + LANES) d = lanes == splat((uint32_t)label) ? d - 1.f : d;
    store(share + column, load(share + column) + d);
    return d;
  };
  for (int64_t column = 0; column < whole; column += LANES)
    store(logits + column, differentiate(logit(column), column));
  if (rest) store(logits + whole, differentiate(last(), whole), rest);
}

template <class T>
static void all_rows(const CrossEntropy& a) {
  thread_local Scratch scratch;
  float* const bias = scratch.room<float>(padded(a.vocabulary));
  widen(a.bias, a.vocabulary, bias);
  const auto some = [&](int64_t first, int64_t end, float* share) {
    for (int64_t index = first; index < end; ++index) one_row<T>(a, index, bias, share);
  };
  if (a.gradient)
    sum_over_rows<1>(a.rows, a.vocabulary, a.d_bias, some);
  else
    parallel(a.rows, 1, [&](int64_t first, int64_t end) { some(first, end, nullptr); });
}

void cross_entropy(const CrossEntropy& a) {
  with_type(a.logits.type, [&]<class T>(T) { all_rows<T>(a); });
}

}  // namespace bertfast::BERTFAST_SET
