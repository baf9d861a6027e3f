// CPU dispatch: every kernel is compiled once for each instruction set, and the best one that the CPU supports is
// chosen when the library is loaded.
#pragma once
#include <optional>

namespace bertfast {

enum class InstructionSet { plain, avx2, avx512, avx512_bf16 };

bool is_supported(InstructionSet set);  // by this CPU, and compiled into this library
InstructionSet instruction_set();       // the one in use
void use(InstructionSet set);           // it must be supported

bool has_quad_instruction();              // whether the set in use has dot products of four int8 on this CPU
void use_quad_instruction(bool allowed);  // if the CPU has it; for tests

// Whether GEMMs of int8 with many tokens use AMX: if the CPU has it, the operating system lets this process use it, and
// the set in use is one of those with 512 bits, which all CPUs with AMX have.
bool has_tiles();
void use_tiles(std::optional<bool> use);  // for tests, which can emulate the instructions; by default as above

}  // namespace bertfast

// Declare a kernel, compiled once for each set in a namespace of its own, and the function that dispatches to it.
#if defined(__x86_64__)
#define BERTFAST_KERNEL(name, Arguments)                                     \
  namespace bertfast::plain { void name(const Arguments&); }                 \
  namespace bertfast::avx2 { void name(const Arguments&); }                  \
  namespace bertfast::avx512 { void name(const Arguments&); }                \
  namespace bertfast::avx512_bf16 { void name(const Arguments&); }           \
  namespace bertfast {                                                       \
  inline void name(const Arguments& arguments) {                             \
    switch (instruction_set()) {                                             \
      case InstructionSet::plain: return plain::name(arguments);             \
      case InstructionSet::avx2: return avx2::name(arguments);               \
      case InstructionSet::avx512: return avx512::name(arguments);           \
      case InstructionSet::avx512_bf16: return avx512_bf16::name(arguments); \
    }                                                                        \
  }                                                                          \
  }
#else
#define BERTFAST_KERNEL(name, Arguments)                                   \
  namespace bertfast::plain { void name(const Arguments&); }               \
  namespace bertfast {                                                     \
  inline void name(const Arguments& arguments) { plain::name(arguments); } \
  }
#endif
