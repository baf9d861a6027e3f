// What a CPU with AMX refuses, for the test of its emulation.
#include <cstdint>

namespace {

struct alignas(64) Configuration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 32};
  uint8_t rows[16] = {16, 16, 16, 16};
};

void configure(const Configuration& configuration) { asm volatile("ldtilecfg %0" : : "m"(configuration)); }

}  // namespace

extern "C" {

void nothing_is_configured() { asm volatile("tilezero %tmm0"); }

void released() {
  configure({});
  asm volatile("tilerelease");
  asm volatile("tilezero %tmm0");
}

void register_without_rows() {
  configure({});
  asm volatile("tilezero %tmm4");
}

void another_palette() {
  Configuration configuration;
  configuration.palette = 2, configure(configuration);
}

void reserved_bytes() {
  Configuration configuration;
  configuration.reserved[3] = 1, configure(configuration);
}

void too_many_rows() {
  Configuration configuration;
  configuration.rows[2] = 17, configure(configuration);
}

void rows_of_no_bytes() {
  Configuration configuration;
  configuration.rows[5] = 1, configure(configuration);
}

// tdpbusd %tmm1, %tmm0, %tmm0, which the assembler refuses.
void same_register() {
  configure({});
  asm volatile(".byte 0xc4, 0xe2, 0x71, 0x5e, 0xc0");
}

void shapes_that_differ() {
  configure({});
  asm volatile("tdpbusd %tmm3, %tmm1, %tmm0");
}

void no_stride() {
  static uint8_t memory[1024];
  configure({});
  asm volatile("tileloadd (%0), %%tmm0" : : "r"(memory));
}

void other_instruction() { asm volatile("ud2"); }

void tile_instruction_of_another_type() {
  configure({});
  asm volatile("tdpbssd %tmm2, %tmm1, %tmm0");
}
}
