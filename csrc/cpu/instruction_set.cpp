#include "instruction_set.h"

#include <atomic>
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace bertfast {

// With BERTFAST_EMULATED the wider sets are emulated with AVX2, so that their code can be tested on any such CPU.
bool is_supported(InstructionSet set) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#if defined(BERTFAST_EMULATED)
  const bool avx512 = avx2, avx512_bf16 = avx2;
#else
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  switch (set) {
    case InstructionSet::plain: return true;
    case InstructionSet::avx2: return avx2;
    case InstructionSet::avx512: return avx512;
    case InstructionSet::avx512_bf16: return avx512_bf16;
  }
  return false;
#else
  return set == InstructionSet::plain;
#endif
}

static InstructionSet best() {
#if defined(BERTFAST_EMULATED)
  constexpr InstructionSet DOWNWARDS[] = {InstructionSet::avx2};  // emulated sets are used only on request
#else
  constexpr InstructionSet DOWNWARDS[] = {InstructionSet::avx512_bf16, InstructionSet::avx512, InstructionSet::avx2};
#endif
  for (InstructionSet set : DOWNWARDS)
    if (is_supported(set)) return set;
  return InstructionSet::plain;
}

static std::atomic<InstructionSet> in_use{best()};

InstructionSet instruction_set() { return in_use.load(std::memory_order_relaxed); }

void use(InstructionSet set) { in_use.store(set, std::memory_order_relaxed); }

static std::atomic<bool> allows_quads{true};

bool has_quad_instruction() {
#if defined(__x86_64__) && !defined(BERTFAST_EMULATED)
  const bool wide = instruction_set() >= InstructionSet::avx512, avx2 = instruction_set() == InstructionSet::avx2;
  const bool has = (wide && __builtin_cpu_supports("avx512vnni")) || (avx2 && __builtin_cpu_supports("avxvnni"));
  return has && allows_quads.load(std::memory_order_relaxed);
#else
  return false;
#endif
}

void use_quad_instruction(bool allowed) { allows_quads.store(allowed, std::memory_order_relaxed); }

#if defined(__x86_64__) && defined(__linux__) && !defined(BERTFAST_EMULATED)
// Whether the CPU has tile registers and dot products of int8 in them, and Linux (5.16 or later) has enabled them.
static bool cpu_has_tiles() {
  constexpr unsigned IN_USE_BY_XSAVE = 1 << 27, INT8_TILES = 1 << 24 | 1 << 25;  // bits of CPUID
  constexpr unsigned TILE_STATE = 1 << 17 | 1 << 18;                             // bits of XCR0
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & IN_USE_BY_XSAVE)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & INT8_TILES) != INT8_TILES) return false;
  asm("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  return (a & TILE_STATE) == TILE_STATE;
}

// Ask Linux to let all threads of this process use the tile registers, which it refuses, for one, if a thread's stack
// for signals is too small to save them.
static bool are_tiles_permitted() {
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#endif

enum class TileUse : char { by_default, never, always };
static std::atomic<TileUse> tile_use{TileUse::by_default};

bool has_tiles() {
  const TileUse use = tile_use.load(std::memory_order_relaxed);
  if (use != TileUse::by_default) return use == TileUse::always;
#if defined(__x86_64__) && defined(__linux__) && !defined(BERTFAST_EMULATED)
  static const bool usable = cpu_has_tiles() && are_tiles_permitted();
  return usable && instruction_set() >= InstructionSet::avx512;
#else
  return false;
#endif
}

void use_tiles(std::optional<bool> use) {
  tile_use.store(!use ? TileUse::by_default : *use ? TileUse::always : TileUse::never, std::memory_order_relaxed);
}

}  // namespace bertfast
