// AMX on a CPU without it: the instructions for tiles of int8, which raise SIGILL there, are decoded and executed by a
// signal handler. So tests run the very machine code that a CPU with AMX runs. There, the handler is never called.
//
// Semantics: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2. What a CPU refuses (#UD and #GP)
// ends the process with a message.
#include <signal.h>
#include <ucontext.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

enum Counter { configured, released, zeroed, loaded, stored, multiplied, COUNTERS };
std::atomic<int64_t> counts[COUNTERS];

constexpr int TILES = 8, MOST_ROWS = 16, MOST_BYTES = 64;

struct Tile {
  int rows, bytes;  // those of the configuration; 0: unusable
  uint8_t data[MOST_ROWS][MOST_BYTES];
};

struct State {
  bool is_configured;
  Tile tiles[TILES];
};
thread_local State state;

[[noreturn]] void refuse(const char* why) {
  std::fprintf(stderr, "AMX: %s\n", why);
  std::abort();
}

void require(bool condition, const char* why) {
  if (!condition) refuse(why);
}

Tile& usable(int index) {
  require(state.is_configured, "the tile registers are not configured");
  require(index < TILES && state.tiles[index].rows > 0, "the tile register is not configured");
  return state.tiles[index];
}

void configure(const uint8_t* memory) {
  uint8_t bytes[64];
  std::memcpy(bytes, memory, sizeof bytes);
  require(bytes[0] == 1 && bytes[1] == 0, "the palette is not 1, or the start row not 0");
  for (int i = 2; i < 64; ++i)
    require((i >= 16 && i < 32) || (i >= 48 && i < 56) || bytes[i] == 0, "reserved bytes of the configuration are set");
  state = {};
  for (int i = 0; i < TILES; ++i) {
    Tile& tile = state.tiles[i];
    tile.bytes = bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8, tile.rows = bytes[48 + i];
    require(tile.bytes <= MOST_BYTES && tile.rows <= MOST_ROWS, "a tile has too many rows or bytes");
    require((tile.bytes == 0) == (tile.rows == 0) && tile.bytes % 4 == 0, "a tile has rows of no or odd bytes");
  }
  state.is_configured = true;
}

// Rows of memory and of a tile. memcpy is the sanitizers' own in a process that runs with them.
void load(Tile& tile, const uint8_t* memory, int64_t stride) {
  std::memset(tile.data, 0, sizeof tile.data);
  for (int row = 0; row < tile.rows; ++row) std::memcpy(tile.data[row], memory + row * stride, (size_t)tile.bytes);
}

void store(const Tile& tile, uint8_t* memory, int64_t stride) {
  for (int row = 0; row < tile.rows; ++row) std::memcpy(memory + row * stride, tile.data[row], (size_t)tile.bytes);
}

// c += a · b, of uint8 in a and int8 in b, with four of each in a dot product.
void multiply(Tile& c, const Tile& a, const Tile& b) {
  require(&c != &a && &c != &b && &a != &b, "two operands are the same tile register");
  require(c.rows == a.rows && c.bytes == b.bytes && a.bytes == 4 * b.rows, "the shapes of the tiles do not match");
  for (int m = 0; m < c.rows; ++m)
    for (int n = 0; n < c.bytes; n += 4) {
      uint32_t sum;
      std::memcpy(&sum, c.data[m] + n, sizeof sum);
      for (int k = 0; k < a.bytes; ++k) sum += (uint32_t)(a.data[m][k] * (int8_t)b.data[k / 4][n + k % 4]);
      std::memcpy(c.data[m] + n, &sum, sizeof sum);
    }
}

// An instruction with a three-byte VEX prefix, opcode map 0F 38, 128 bits and W = 0: C4, two bytes, the opcode, ModRM.
class Instruction {
 public:
  Instruction(const uint8_t* code, const gregset_t& registers) : code_(code), registers_(registers) {
    if (memory()) address_ = decode_address();
  }
  bool is_known() const { return code_[0] == 0xc4 && (code_[1] & 0x1f) == 2 && (code_[2] & 0x84) == 0; }
  int opcode() const { return code_[3]; }
  int prefix() const { return code_[2] & 3; }  // none, 66, F3, F2
  bool memory() const { return code_[4] >> 6 != 3; }
  int reg() const { return (~code_[1] >> 4 & 8) | (code_[4] >> 3 & 7); }
  int rm() const { return (~code_[1] >> 2 & 8) | (code_[4] & 7); }
  int vvvv() const { return ~code_[2] >> 3 & 15; }
  uint8_t* address() const { return (uint8_t*)address_; }
  bool has_stride() const { return has_index_; }
  int64_t stride() const { return stride_; }
  int length() const { return length_; }

 private:
  int64_t general(int index) const {
    constexpr int ORDER[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                             REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return registers_[ORDER[index]];
  }

  // Base and displacement; the index, scaled, is the stride of rows.
  int64_t decode_address() {
    const int mod = code_[4] >> 6, extension = ~code_[1] >> 2 & 8;  // of the base; ~X extends the index
    int base = code_[4] & 7;
    bool has_base = true;
    if (base == 4) {
      const int sib = code_[length_++], index = (~code_[1] >> 3 & 8) | (sib >> 3 & 7);
      has_index_ = index != 4, base = sib & 7;
      if (has_index_) stride_ = general(index) * (1 << (sib >> 6));
      has_base = mod != 0 || base != 5;
    } else if (mod == 0 && base == 5) {  // relative to the next instruction
      int32_t displacement;
      std::memcpy(&displacement, code_ + length_, 4), length_ += 4;
      return (int64_t)(code_ + length_) + displacement;
    }
    int32_t displacement = 0;
    if (mod == 1) displacement = (int8_t)code_[length_++];
    if (mod == 2 || !has_base) std::memcpy(&displacement, code_ + length_, 4), length_ += 4;
    return displacement + (has_base ? general(extension | base) : 0);
  }

  const uint8_t* code_;
  const gregset_t& registers_;
  int64_t address_ = 0, stride_ = 0;
  bool has_index_ = false;
  int length_ = 5;
};

// Execute an instruction, and return what to count; COUNTERS if it is another one.
Counter execute(const Instruction& i) {
  constexpr int NONE = 0, P66 = 1, F3 = 2, F2 = 3;
  if (!i.is_known()) return COUNTERS;
  if (i.opcode() == 0x49 && i.prefix() == NONE && i.memory()) return configure(i.address()), configured;
  if (i.opcode() == 0x49 && i.prefix() == NONE) return state = {}, released;
  if (i.opcode() == 0x49 && i.prefix() == F2 && !i.memory()) {
    Tile& tile = usable(i.reg());
    return std::memset(tile.data, 0, sizeof tile.data), zeroed;
  }
  if (i.opcode() == 0x4b && i.memory() && (i.prefix() == F2 || i.prefix() == F3)) {
    require(i.has_stride(), "rows have no stride");
    if (i.prefix() == F2) return load(usable(i.reg()), i.address(), i.stride()), loaded;
    return store(usable(i.reg()), i.address(), i.stride()), stored;
  }
  if (i.opcode() == 0x5e && i.prefix() == P66 && !i.memory())
    return multiply(usable(i.reg()), usable(i.rm()), usable(i.vvvv())), multiplied;
  return COUNTERS;
}

struct sigaction previous;

void on_illegal_instruction(int, siginfo_t*, void* context) {
  gregset_t& registers = ((ucontext_t*)context)->uc_mcontext.gregs;
  const Instruction instruction((const uint8_t*)registers[REG_RIP], registers);
  const Counter counter = execute(instruction);
  if (counter == COUNTERS) sigaction(SIGILL, &previous, nullptr);  // which gets the signal when the instruction repeats
  else ++counts[counter], registers[REG_RIP] += instruction.length();
}

}  // namespace

extern "C" void start_emulation() {
  struct sigaction action{};
  action.sa_sigaction = on_illegal_instruction, action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGILL, &action, &previous);
}

extern "C" void stop_emulation() { sigaction(SIGILL, &previous, nullptr); }

extern "C" int64_t emulated_count(int counter) { return counts[counter]; }
