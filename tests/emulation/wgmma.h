// wgmma: operands are read through their descriptors when the last thread of the warpgroup has issued the wgmma; it
// completes when no thread can go on without it, and until it is waited for its results are NaN.
#pragma once
#include <algorithm>

#include "copies.h"

namespace emulation {

constexpr uint32_t POISON_WORD = 0xffffffff;

// The index in a Result of a thread's register i. The eight elements of an A operand in registers have the same layout.
inline int fragment_offset(int i) {
  const int t = current->number % 128;
  return t % 4 * 128 + t / 4 % 8 + t / 32 * 16 + i % 2 * 64 + i / 2 % 2 * 8 + i / 4 * 512;
}

// Call visit(first mn, first k, shared address) for each 16 bytes of an operand of depth 16.
template <class Visit>
void for_each_chunk(uint64_t descriptor, bool transposed, int extent, const Visit& visit) {
  const auto field = [&](int bit) { return (uint32_t)(descriptor >> bit & 0x3fff) << 4; };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  const uint32_t mode = (uint32_t)(descriptor >> 62), span = mode == 0 ? 16 : 256 >> mode;
  // PTX requires a base offset if the pattern is not aligned, without an exact definition of its effect.
  if (descriptor >> 49 & 7 || swizzle(start, span) != start)
    fail("a tile for wgmma at shared+%u: it must start at a multiple of 8 x %u bytes", start, span);
  const auto at = [&](int mn, int k, uint32_t offset) { visit(mn, k, swizzle(start + offset, span) % WINDOW); };
  if (!transposed) {
    for (int mn = 0; mn < extent; ++mn) {
      const uint32_t row = mn / 8 * stride + mn % 8 * span;
      at(mn, 0, row);
      at(mn, 8, row + (mode == 0 ? leading : 16));
    }
    return;
  }
  const uint32_t next_8 = mode == 0 ? leading : stride, next_panel = mode == 0 ? stride : leading;
  // A slice may begin within a panel: its columns there are counted from the panel's start.
  const uint32_t begin = start % span;
  for (int k = 0; k < 16; ++k)
    for (int mn = 0; mn < extent; mn += 8) {
      const uint32_t column = begin + mn * 2;
      at(mn, k, k / 8 * next_8 + k % 8 * span + column / span * next_panel + column % span - begin);
    }
}

inline Operand read_operand(uint64_t descriptor, bool transposed, int extent) {
  Operand operand(16 * extent);
  for_each_chunk(descriptor, transposed, extent, [&](int mn, int k, uint32_t address) {
    address_of(window + address, 16);
    check_no_load(address, 16, "wgmma");
    if (memcmp(window + address, async_view + address, 16) != 0)
      fail("wgmma reads shared+%u, written without fence_proxy", address);
    uint16_t chunk[8];
    memcpy(chunk, async_view + address, 16);
    for (int i = 0; i < 8; ++i) operand[transposed ? k * extent + mn + i : (k + i) * extent + mn] = chunk[i];
  });
  return operand;
}

inline void compute(Wgmma& wgmma) {
  Result& result = *wgmma.result;
  const int columns = (int)result.size() / 64;
  if (!wgmma.a_in_registers) wgmma.a = read_operand(wgmma.descriptor_a, wgmma.a_transposed, 64);
  wgmma.b = read_operand(wgmma.descriptor_b, wgmma.b_transposed, columns);
  if (!wgmma.adds) std::fill(result.begin(), result.end(), 0.f);
  float a[16 * 64];
  std::transform(wgmma.a.begin(), wgmma.a.end(), a, wgmma.widen);
  for (int column = 0; column < columns; ++column)
    for (int k = 0; k < 16; ++k) {
      const float b = wgmma.widen(wgmma.b[k * columns + column]);
      for (int row = 0; row < 64; ++row) result[column * 64 + row] += a[k * 64 + row] * b;
    }
}

// A thread's part of issuing a wgmma: its accumulator registers d, and those of the A operand if it is in registers.
inline void issue(float* d, int count, const uint32_t* a, Wgmma proposed) {
  may_switch();
  if (!current->fenced) fail("wgmma without fence_wgmma since its registers could be used");
  Warpgroup& group = block->warpgroups[current->number / 128];
  const uint32_t index = current->issued++;
  auto& owned = current->owned;
  const auto mine = std::find_if(owned.begin(), owned.end(), [&](const Owned& other) { return other.registers == d; });
  if (index == group.wgmmas.size()) {
    proposed.result = mine != owned.end() ? mine->result : std::make_shared<Result>(128 * count);
    proposed.a.resize(16 * 64);
    group.wgmmas.push_back(proposed);
  }
  Wgmma& wgmma = group.wgmmas[index];
  if (wgmma.descriptor_a != proposed.descriptor_a || wgmma.descriptor_b != proposed.descriptor_b ||
      wgmma.adds != proposed.adds || wgmma.result->size() != 128u * count ||
      (mine != owned.end() && mine->result != wgmma.result))
    fail("the threads of a warpgroup issue different wgmmas");
  if (mine != owned.end()) {
    mine->last = index;
  } else {
    owned.push_back({d, count, wgmma.result, index});
    for (int i = 0; i < count; ++i) {
      (*wgmma.result)[fragment_offset(i)] = d[i];
      memcpy(&d[i], &POISON_WORD, 4);
    }
  }
  for (int i = 0; a && i < 8; ++i) wgmma.a[fragment_offset(i)] = (uint16_t)(a[i / 2] >> (i % 2 * 16));
  // Each warp checks the operands: one that has not waited for them must not be rescued by a later one.
  if (lane() == 0) {
    read_operand(wgmma.descriptor_b, wgmma.b_transposed, count * 2);
    if (!a) read_operand(wgmma.descriptor_a, wgmma.a_transposed, 64);
  }
  if (++wgmma.issued_by == 128) {
    compute(wgmma);
    ++group.multiplied;
  }
}

// Complete a wgmma; its operands must not have been changed, nor be the target of a load, while it was in flight.
inline bool complete_a_wgmma() {
  for (Warpgroup& group : block->warpgroups) {
    if (group.completed == group.multiplied) continue;
    Wgmma& wgmma = group.wgmmas[group.completed++];
    const int columns = (int)wgmma.result->size() / 64;
    if (wgmma.b != read_operand(wgmma.descriptor_b, wgmma.b_transposed, columns) ||
        (!wgmma.a_in_registers && wgmma.a != read_operand(wgmma.descriptor_a, wgmma.a_transposed, 64)))
      fail("an operand of wgmma in shared memory was changed while the wgmma was in flight");
    wgmma.a = wgmma.b = {};
    return true;
  }
  return false;
}

inline void wait_wgmma(size_t keep) {
  may_switch();
  std::vector<uint32_t>& committed = current->committed;
  if (committed.size() <= keep) return;
  const uint32_t goal = committed[committed.size() - keep - 1];  // the wgmmas before it must be complete
  committed.erase(committed.begin(), committed.end() - (ptrdiff_t)keep);
  Warpgroup& group = block->warpgroups[current->number / 128];
  if (group.completed < goal) wait_until(&group.completed, goal, "wait_wgmma, for all threads to issue");
  auto& owned = current->owned;
  const auto release = [&](const Owned& accumulator) {
    if (accumulator.last >= goal) return false;
    for (int i = 0; i < accumulator.count; ++i) {
      if (memcmp(&accumulator.registers[i], &POISON_WORD, 4))
        fail("result d[%d] was written while a wgmma was in flight", i);
      accumulator.registers[i] = (*accumulator.result)[fragment_offset(i)];
    }
    return true;
  };
  owned.erase(std::remove_if(owned.begin(), owned.end(), release), owned.end());
  current->fenced = false;
}

}  // namespace emulation
