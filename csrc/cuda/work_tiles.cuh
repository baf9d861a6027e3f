// Work tiles of the persistent blocks of attention, and how the producer hands them to the other warps.
#pragma once
#include "../attention.h"

#include "hopper.cuh"

namespace bertfast::cuda {

constexpr int ATTENTION_THREADS = 384, CONSUMERS = 256;
constexpr int BLOCK = 128;  // queries, or keys, of both consumers together

// x, which is the same in all threads of a warp, by a shuffle, so that the compiler knows that it is: descriptors of
// wgmma are then computed in uniform registers, where it takes them from.
DEVICE int uniform(int x) { return __shfl_sync(~0u, x, 0); }

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// One head of a sequence, tokens first … end - 1: queries, or keys in the backward pass over keys.
struct alignas(16) WorkTile {
  int64_t start;  // the sequence's first token
  int length, head;
  int first, end;
  uint32_t sequence_id;  // for dropout; 0 without

  DEVICE bool is_empty() const { return first >= end; }
};

// Assigns the work tiles to blocks, which take one each per turn. The head varies fastest, so that neighbouring blocks
// read neighbouring memory. Whole sequences come in the order of the table, the longest first, and every other turn
// runs backwards: the blocks with the longer tiles of one turn get the shorter ones of the next.
struct TileScheduler {
  const int32_t* cu_seqlens;
  const Words4* table;
  const int64_t* sequence_ids;  // null without dropout
  int sequences, heads;
  int count;
  bool whole;  // a work tile is a whole sequence; else at most BLOCK tokens of it

  static TileScheduler of(const AttentionInputs& a, bool whole) {
    // Sequence s owns the blocks from cu_seqlens[s] / BLOCK + s on, which leaves enough for all sequences before it.
    // Without sequences there are no work tiles, even with padding slots: the bisection would read past cu_seqlens.
    const int64_t blocks = whole || a.sequences == 0 ? a.sequences : a.capacity / BLOCK + a.sequences;
    const int64_t* const sequence_ids = a.dropout.threshold == 0 ? nullptr : a.dropout.sequence_ids;
    return {a.cu_seqlens, (const Words4*)a.table, sequence_ids, a.sequences, a.heads, (int)(blocks * a.heads), whole};
  }

  // Whether the calling block has a work tile in its turn.
  DEVICE bool has(int turn) const { return index_in(turn) < count; }

  DEVICE WorkTile operator[](int turn) const {
    const int block = index_in(turn) / heads, head = index_in(turn) % heads;
    if (whole && table != nullptr) {
      const Words4 row = table[block];
      return of_sequence((int)row.word[0], (int)row.word[1], (int)row.word[2], head, (int)row.word[3]);
    }
    if (whole) return of_sequence(block, cu_seqlens[block], cu_seqlens[block + 1] - cu_seqlens[block], head, 0);
    int low = 0, high = sequences;  // bisection: the sequence is in [low, high)
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (cu_seqlens[middle] / BLOCK + middle <= block) low = middle;
      else high = middle;
    }
    const int start = cu_seqlens[low];
    WorkTile work = of_sequence(low, start, cu_seqlens[low + 1] - start, head, (block - start / BLOCK - low) * BLOCK);
    if (work.first + BLOCK < work.length) work.end = work.first + BLOCK;
    return work;
  }

 private:
  // All tokens of a sequence from `first` on.
  DEVICE WorkTile of_sequence(int sequence, int start, int length, int head, int first) const {
    const uint32_t id = sequence_ids == nullptr ? 0 : (uint32_t)sequence_ids[sequence];
    return {start, length, head, first, length, id};
  }

  DEVICE int index_in(int turn) const {
    const int blocks = (int)gridDim.x, block = (int)blockIdx.x;
    return turn * blocks + (turn % 2 == 0 ? block : blocks - 1 - block);
  }
};

// The same work tile, in uniform registers.
DEVICE WorkTile uniform(const WorkTile& work) {
  return {uniform((int)work.start), uniform(work.length), uniform(work.head),
          uniform(work.first),      uniform(work.end),    work.sequence_id};
}

// Initialise the barriers of a ring of stages, which one thread fills and `warps` warps empty.
template <int STAGES>
DEVICE void init_ring(uint64_t (&full)[STAGES], uint64_t (&empty)[STAGES], int warps = CONSUMERS / 32) {
  for (int stage = 0; stage < STAGES; ++stage) {
    init(&full[stage], 1);
    init(&empty[stage], (uint32_t)warps);
  }
}

// The work tiles of this turn and the next, from the producer to other warps. Only the producer, which runs ahead,
// waits for global memory then: at the start of a work tile these loads, one after another, would delay all else.
struct WorkRing {
  static constexpr int STAGES = 2;
  WorkTile tiles[STAGES];
  uint64_t full[STAGES], empty[STAGES];

  DEVICE void put(int turn, const WorkTile& work) {
    const int stage = turn % STAGES;
    wait(&empty[stage], (turn / STAGES + 1) % 2);
    tiles[stage] = work;
    arrive(&full[stage]);
  }

  // Return the work tile of a turn, which all lanes of a warp take.
  DEVICE WorkTile take(int turn) {
    const int stage = turn % STAGES;
    wait(&full[stage], turn / STAGES % 2);
    const WorkTile work = tiles[stage];
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(&empty[stage]);
    return work;
  }
};

// One persistent block per SM, or fewer if there are fewer work tiles.
inline int persistent_blocks(const TileScheduler& scheduler) {
  const int sms = sm_count();
  return scheduler.count < 1 ? 1 : scheduler.count < sms ? scheduler.count : sms;
}

}  // namespace bertfast::cuda
