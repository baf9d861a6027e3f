// TMA. A load happens as late as possible, when no thread can run without it; a store when its thread waits for it.
#pragma once
#include "barriers.h"

// Opaque to kernels; holds a TensorMap.
struct CUtensorMap {
  alignas(64) unsigned char bytes[192];
};

namespace emulation {

static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

// Rejects what the driver rejects. The driver also accepts swizzled boxes narrower than the span, which no kernel here
// uses and whose layout is not modelled.
inline CUtensorMap encode(const void* data, uint32_t rank, const uint64_t* sizes, const uint64_t* strides,
                          const uint32_t* box, uint32_t swizzle_mode) {
  TensorMap map = {(char*)const_cast<void*>(data), {}, {2}, {}, rank, 16u << swizzle_mode};
  bool valid = (uintptr_t)data % 16 == 0;
  for (uint32_t i = 0; i < rank; ++i) {
    map.sizes[i] = sizes[i], map.box[i] = box[i];
    if (i > 0) map.strides[i] = strides[i - 1];
    valid = valid && sizes[i] > 0 && sizes[i] <= 1ull << 32 && box[i] > 0 && box[i] <= 256;
    valid = valid && (i == 0 || (map.strides[i] > 0 && map.strides[i] % 16 == 0 && map.strides[i] < 1ull << 40));
  }
  const uint32_t row = box[0] * 2;
  valid = valid && row % 16 == 0 && (swizzle_mode == 0 || row == map.span);
  if (!valid) throw std::runtime_error("no tensor map of such a tensor: CUDA error 1");
  CUtensorMap opaque;
  memcpy(&opaque, &map, sizeof map);
  return opaque;
}

inline const TensorMap& tensor_map(const CUtensorMap* opaque, size_t coordinates) {
  const TensorMap& map = *(const TensorMap*)opaque;
  if (coordinates != map.rank) fail("%zu coordinates for a tensor map of rank %u", coordinates, map.rank);
  return map;
}

// Call visit(shared address, pointer into the tensor or null out of bounds) for every element of the box.
template <class Visit>
void for_each_element(const TensorMap& map, const std::array<int, 5>& origin, uint32_t shared, const Visit& visit) {
  for (uint32_t row = 0, rows = map.rows(); row < rows; ++row) {
    char* line = map.data;
    bool inside = true;
    uint32_t rest = row;
    for (uint32_t i = 1; i < map.rank; ++i) {
      const int64_t at = origin[i] + (int64_t)(rest % map.box[i]);
      rest /= map.box[i];
      inside = inside && at >= 0 && at < (int64_t)map.sizes[i];
      line += at * (int64_t)map.strides[i];
    }
    for (uint32_t column = 0; column < map.box[0]; ++column) {
      const int64_t at = origin[0] + (int64_t)column;
      const bool element = inside && at >= 0 && at < (int64_t)map.sizes[0];
      visit(swizzle(shared + (row * map.box[0] + column) * 2, map.span), element ? line + at * 2 : nullptr);
    }
  }
}

inline void check_no_load(uint32_t begin, uint32_t bytes, const char* who) {
  for (const Load& load : block->loads)
    if (begin < load.shared + load.map.box_bytes() && load.shared < begin + bytes)
      fail("%s touches shared+%u while a TMA load to it is in flight", who, begin);
}

inline void begin_load(void* to, const TensorMap& map, const void* barrier, const std::array<int, 5>& origin) {
  may_switch();
  const uint32_t shared = address_of(to, map.box_bytes(), 128);
  check_no_load(shared, map.box_bytes(), "another TMA load");
  if (!mbarrier(barrier).shown_to_tma) fail("a TMA load on an mbarrier without fence_init");
  block->loads.push_back({map, origin, shared, address_of(barrier)});
}

inline void finish(const Load& load) {
  for_each_element(load.map, load.origin, load.shared, [](uint32_t address, const char* element) {
    uint16_t value = 0;
    if (element) memcpy(&value, element, 2);
    memcpy(window + address, &value, 2);
    memcpy(async_view + address, &value, 2);
  });
  MBarrier& barrier = mbarrier(window + load.barrier);
  barrier.missing_bytes -= load.map.box_bytes();
  complete_phase_if_done(barrier);
}

inline bool finish_a_load() {
  if (block->loads.empty()) return false;
  const auto chosen = block->loads.begin() + (seed ? (ptrdiff_t)(random_bits() % block->loads.size()) : 0);
  const Load load = *chosen;
  block->loads.erase(chosen);
  finish(load);
  return true;
}

inline void begin_store(const TensorMap& map, const void* from, const std::array<int, 5>& origin) {
  const uint32_t shared = address_of(from, map.box_bytes(), 128);
  current->stores.open.push_back([map, shared, origin] {
    for_each_element(map, origin, shared, [](uint32_t address, char* element) {
      if (memcmp(window + address, async_view + address, 2) != 0)
        fail("a TMA store reads shared+%u, written without fence_proxy", address);
      if (element) memcpy(element, async_view + address, 2);
    });
  });
}

}  // namespace emulation
