#include "instruction_set.h"

#include <atomic>

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

}  // namespace bertfast
