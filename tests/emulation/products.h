// wgmma: operands are read through their descriptors when the last thread of the warpgroup has issued the product; it
// completes when no thread can go on without it, and until it is waited for its results are NaN.
#pragma once
#include <algorithm>

#include "copies.h"

namespace emulation {

constexpr uint32_t POISON_WORD = 0xffffffff;

// Where in a Result a thread's register i is. The eight numbers of a first operand in registers lie alike.
inline int fragment_offset(int i) {
  const int t = current->number % 128;
  return t % 4 * 128 + t / 4 % 8 + t / 32 * 16 + i % 2 * 64 + i / 2 % 2 * 8 + i / 4 * 512;
}

// visit(first mn, first k, shared address) for each 16 bytes of an operand of depth 16.
template <class Visit>
void for_each_chunk(uint64_t descriptor, bool transposed, int extent, const Visit& visit) {
  const auto field = [&](int bit) { return (uint32_t)(descriptor >> bit & 0x3fff) << 4; };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  const uint32_t mode = (uint32_t)(descriptor >> 62), span = mode == 0 ? 16 : 256 >> mode;
  // PTX asks for a base offset where a pattern starts elsewhere, and does not say what exactly it does.
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

inline void multiply(Product& product) {
  Result& result = *product.result;
  const int columns = (int)result.size() / 64;
  if (!product.a_in_registers) product.a = read_operand(product.descriptor_a, product.a_transposed, 64);
  product.b = read_operand(product.descriptor_b, product.b_transposed, columns);
  if (!product.adds) std::fill(result.begin(), result.end(), 0.f);
  float a[16 * 64];
  std::transform(product.a.begin(), product.a.end(), a, product.widen);
  for (int column = 0; column < columns; ++column)
    for (int k = 0; k < 16; ++k) {
      const float b = product.widen(product.b[k * columns + column]);
      for (int row = 0; row < 64; ++row) result[column * 64 + row] += a[k * 64 + row] * b;
    }
}

// A thread's part of issuing a product: registers d of its result, and those of the first operand if it is there.
inline void issue(float* d, int count, const uint32_t* a, Product proposed) {
  may_switch();
  if (!current->fenced) fail("wgmma without fence_products since its registers could be used");
  Warpgroup& group = block->warpgroups[current->number / 128];
  const uint32_t index = current->issued++;
  auto& owned = current->owned;
  const auto mine = std::find_if(owned.begin(), owned.end(), [&](const Owned& other) { return other.registers == d; });
  if (index == group.products.size()) {
    proposed.result = mine != owned.end() ? mine->result : std::make_shared<Result>(128 * count);
    proposed.a.resize(16 * 64);
    group.products.push_back(proposed);
  }
  Product& product = group.products[index];
  if (product.descriptor_a != proposed.descriptor_a || product.descriptor_b != proposed.descriptor_b ||
      product.adds != proposed.adds || product.result->size() != 128u * count ||
      (mine != owned.end() && mine->result != product.result))
    fail("the threads of a warpgroup issue different products");
  if (mine != owned.end()) {
    mine->last = index;
  } else {
    owned.push_back({d, count, product.result, index});
    for (int i = 0; i < count; ++i) {
      (*product.result)[fragment_offset(i)] = d[i];
      memcpy(&d[i], &POISON_WORD, 4);
    }
  }
  for (int i = 0; a && i < 8; ++i) product.a[fragment_offset(i)] = (uint16_t)(a[i / 2] >> (i % 2 * 16));
  // Looked at by each warp too: one that has not waited for the operands must not be saved by a later one.
  if (lane() == 0) {
    read_operand(product.descriptor_b, product.b_transposed, count * 2);
    if (!a) read_operand(product.descriptor_a, product.a_transposed, 64);
  }
  if (++product.issued_by == 128) {
    multiply(product);
    ++group.multiplied;
  }
}

// Nobody may have changed the operands, or begun a load to them, while the product was under way.
inline bool complete_a_product() {
  for (Warpgroup& group : block->warpgroups) {
    if (group.completed == group.multiplied) continue;
    Product& product = group.products[group.completed++];
    const int columns = (int)product.result->size() / 64;
    if (product.b != read_operand(product.descriptor_b, product.b_transposed, columns) ||
        (!product.a_in_registers && product.a != read_operand(product.descriptor_a, product.a_transposed, 64)))
      fail("an operand of wgmma in shared memory was changed while the product was under way");
    product.a = product.b = {};
    return true;
  }
  return false;
}

inline void wait_products(size_t keep) {
  may_switch();
  std::vector<uint32_t>& committed = current->committed;
  if (committed.size() <= keep) return;
  const uint32_t goal = committed[committed.size() - keep - 1];  // the products before it must be complete
  committed.erase(committed.begin(), committed.end() - (ptrdiff_t)keep);
  Warpgroup& group = block->warpgroups[current->number / 128];
  if (group.completed < goal) wait_until(&group.completed, goal, "wait_products, for all threads to issue");
  auto& owned = current->owned;
  const auto give = [&](const Owned& some) {
    if (some.last >= goal) return false;
    for (int i = 0; i < some.count; ++i) {
      if (memcmp(&some.registers[i], &POISON_WORD, 4)) fail("result d[%d] was written while a product was under way", i);
      some.registers[i] = (*some.result)[fragment_offset(i)];
    }
    return true;
  };
  owned.erase(std::remove_if(owned.begin(), owned.end(), give), owned.end());
  current->fenced = false;
}

}  // namespace emulation
