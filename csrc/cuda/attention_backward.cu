// Attention's backward pass: one kernel for short sequences, two for longer ones. Every sum has one owner and a fixed
// order, so results are deterministic.
#include "attention_keys.cuh"
#include "attention_queries.cuh"

namespace bertfast::cuda {

void attention_backward(const AttentionBackward& a, Stream stream) {
  if (a.capacity == 0) return;
  with_attention_shape(a, [&]<class T, int D>(T, std::integral_constant<int, D>) {
    const bool fused = a.max_seqlen_bound <= MAX_FUSED_SEQLEN<D>;
    const TileScheduler scheduler = TileScheduler::of(a, fused);
    const int blocks = persistent_blocks(scheduler);
    const CUtensorMap qkv = rows_map<D>(a.qkv, a.capacity, 3 * a.heads, a.stride);
    const CUtensorMap d_o = rows_map<D>(a.d_o, a.capacity, a.heads, (int64_t)a.heads * D);
    if (!fused || !COMPUTES_DELTA<D>) {
      const int64_t needed = (a.capacity * a.heads * (D / 8) + 255) / 256, most = sm_count() * 8;
      launch(delta_kernel<T, D>, (int)(needed < most ? needed : most), 256, 0, stream, a);
    }
    const auto launch_keys = [&]<int MAX_SEQLEN>(std::integral_constant<int, MAX_SEQLEN>) {
      launch(attention_keys_kernel<T, D, MAX_SEQLEN>, blocks, ATTENTION_THREADS, sizeof(KeyMemory<D, MAX_SEQLEN>),
             stream, a, scheduler, qkv, d_o);
    };
    if (a.max_seqlen_bound <= MAX_PREFETCHED_SEQLEN<D>) {
      launch_keys(std::integral_constant<int, MAX_PREFETCHED_SEQLEN<D>>{});
    } else if (fused) {
      launch_keys(std::integral_constant<int, MAX_FUSED_SEQLEN<D>>{});
    } else {
      launch_keys(std::integral_constant<int, 0>{});
      launch(attention_queries_kernel<T, D>, blocks, ATTENTION_THREADS, sizeof(QueryMemory<D>), stream, a, scheduler,
             qkv, d_o);
    }
  });
}

}  // namespace bertfast::cuda
