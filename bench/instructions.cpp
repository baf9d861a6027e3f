// Run one CPU kernel on one thread, with the instruction set that the kernels were compiled for, for a program that
// counts instructions (bench/instructions.py): instructions KERNEL forward|backward TOKENS. Widths are those of
// BERT-base.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../csrc/add_layer_norm.h"
#include "../csrc/attention.h"
#include "../csrc/bias_gelu.h"
#include "../csrc/cpu/attention_tasks.h"
#include "../csrc/cpu/parallel.h"
#include "../csrc/cross_entropy.h"
#include "../csrc/embeddings.h"
#include "../csrc/gelu_layer_norm.h"
#include "../csrc/packed_linear.h"
#include "../csrc/rotary.h"

namespace bertfast {

int threads() { return 1; }
void run_parts(int64_t count, int64_t, Part part, void* context) { part(0, count, context); }
bool has_quad_instruction() { return false; }
bool has_tiles() { return false; }

}  // namespace bertfast

using namespace bertfast;

namespace {

constexpr int64_t HIDDEN = 768, WIDE = 3072, HEADS = 12, HEAD_DIM = 64, VOCAB = 30522, LENGTH = 128;
constexpr int WINDOW = 64, UNLIMITED = 1 << 30;
constexpr float EPS = 1e-12f;
constexpr int THRESHOLD = 26;  // dropout 0.1
uint64_t seed = 1;

// Return `count` floats between -1 and 1, the same in every run; they are kept until the program ends.
float* floats(int64_t count) {
  static uint32_t state = 1;
  float* values = static_cast<float*>(std::aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64));
  for (int64_t i = 0; i < count; ++i) state = state * 1664525 + 1013904223, values[i] = (int32_t)state * 0x1p-31f;
  return values;
}

Rows rows(int64_t count, int64_t columns) { return {floats(count * columns), Type::float32, columns}; }
Vector vector(int64_t count) { return {floats(count), Type::float32}; }

// Return 0, 1, 2 … `end` - 1, repeated.
template <class Integer = int64_t>
Integer* indices(int64_t count, int64_t end) {
  Integer* values = static_cast<Integer*>(std::malloc(count * sizeof(Integer)));
  for (int64_t i = 0; i < count; ++i) values[i] = static_cast<Integer>(i % end);
  return values;
}

HiddenDropout dropout(int64_t tokens) {
  return {&seed, indices(tokens, 1 << 20), indices(tokens, LENGTH), 0, THRESHOLD};
}

void add_layer_norm(int64_t tokens, bool backward) {
  AddLayerNormForward a{
      tokens,         HIDDEN, rows(tokens, HIDDEN), rows(tokens, HIDDEN), vector(HIDDEN), vector(HIDDEN),
      vector(HIDDEN), EPS,    dropout(tokens),      rows(tokens, HIDDEN), Rows{},         floats(tokens),
      floats(tokens)};
  if (!backward) return BERTFAST_SET::add_layer_norm_forward(a);
  BERTFAST_SET::add_layer_norm_backward({tokens, HIDDEN, rows(tokens, HIDDEN), Rows{}, a.x, a.residual, a.bias, a.gamma,
                                         a.mean, a.rstd, a.dropout, rows(tokens, HIDDEN), rows(tokens, HIDDEN),
                                         floats(3 * HIDDEN), 1});
}

void bias_gelu(int64_t tokens, bool backward) {
  const Rows x = rows(tokens, WIDE);
  if (!backward) return BERTFAST_SET::bias_gelu_forward({tokens, WIDE, x, vector(WIDE), false, rows(tokens, WIDE)});
  BERTFAST_SET::bias_gelu_backward(
      {tokens, WIDE, rows(tokens, WIDE), x, vector(WIDE), false, rows(tokens, WIDE), floats(WIDE), 1});
}

void gelu_layer_norm(int64_t tokens, bool backward) {
  GeluLayerNormForward a{tokens,         HIDDEN, rows(tokens, HIDDEN), vector(HIDDEN), vector(HIDDEN),
                         vector(HIDDEN), EPS,    rows(tokens, HIDDEN), floats(tokens), floats(tokens)};
  if (!backward) return BERTFAST_SET::gelu_layer_norm_forward(a);
  BERTFAST_SET::gelu_layer_norm_backward({tokens, HIDDEN, rows(tokens, HIDDEN), a.x, a.bias, a.gamma, a.mean, a.rstd,
                                          rows(tokens, HIDDEN), floats(3 * HIDDEN), 1});
}

void embeddings(int64_t tokens, bool backward) {
  const Embeddings from{tokens,
                        HIDDEN,
                        rows(LENGTH, HIDDEN),
                        rows(LENGTH, HIDDEN),
                        rows(2, HIDDEN),
                        indices(tokens, LENGTH),
                        indices(tokens, LENGTH),
                        indices(tokens, 2)};
  EmbeddingsForward a{from,           vector(HIDDEN), vector(HIDDEN), EPS, dropout(tokens), rows(tokens, HIDDEN),
                      floats(tokens), floats(tokens)};
  if (!backward) return BERTFAST_SET::embeddings_forward(a);
  BERTFAST_SET::embeddings_backward(
      {from, rows(tokens, HIDDEN), a.gamma, a.mean, a.rstd, a.dropout, rows(tokens, HIDDEN), floats(2 * HIDDEN)});
}

void cross_entropy(int64_t tokens, bool backward) {
  BERTFAST_SET::cross_entropy({tokens, VOCAB, rows(tokens, VOCAB), vector(VOCAB), indices(tokens, VOCAB),
                               floats(tokens), indices(tokens, 1), backward ? floats(VOCAB) : nullptr, nullptr});
}

template <class Tasks>
AttentionInputs attention_inputs(int64_t tokens, int64_t length, int window, const int32_t* cu_seqlens, int sequences,
                                 const Tasks& tasks) {
  AttentionInputs inputs{};
  inputs.capacity = inputs.num_tokens = tokens, inputs.heads = HEADS, inputs.head_dim = HEAD_DIM;
  inputs.sequences = sequences, inputs.max_seqlen_bound = (int)length, inputs.cu_seqlens = cu_seqlens;
  inputs.qkv = floats(tokens * 3 * HIDDEN), inputs.type = Type::float32, inputs.stride = 3 * HIDDEN;
  inputs.scale = 0.125f, inputs.window = window;
  inputs.dropout = {&seed, indices(sequences, sequences), 0, THRESHOLD};
  inputs.tasks = tasks.data(), inputs.task_count = (int64_t)tasks.size();
  return inputs;
}

void attention_of(int64_t tokens, int64_t length, int window, bool backward) {
  const int sequences = (int)(tokens / length);
  int32_t* const cu_seqlens = indices<int32_t>(sequences + 1, sequences + 1);
  for (int i = 0; i <= sequences; ++i) cu_seqlens[i] *= static_cast<int32_t>(length);
  const auto tasks = attention_tasks(cu_seqlens, sequences, HEADS, window, 1, backward);
  const AttentionInputs inputs = attention_inputs(tokens, length, window, cu_seqlens, sequences, tasks);
  void *const o = floats(tokens * HIDDEN), *const d_o = floats(tokens * HIDDEN);
  float* const lse = floats(HEADS * tokens);
  if (!backward) return BERTFAST_SET::attention_forward(AttentionForward{inputs, o, lse});
  BERTFAST_SET::attention_backward(AttentionBackward{inputs, d_o, o, lse, floats(tokens * 3 * HIDDEN), nullptr});
}

void attention(int64_t tokens, bool backward) { attention_of(tokens, LENGTH, UNLIMITED, backward); }

// One sequence of all tokens.
void attention_window(int64_t tokens, bool backward) { attention_of(tokens, tokens, WINDOW, backward); }

void rotary(int64_t tokens, bool backward) {
  BERTFAST_SET::rotary(
      {tokens, HEADS, HEAD_DIM, rows(tokens, 3 * HIDDEN), rows(tokens, HEAD_DIM), backward, rows(tokens, 3 * HIDDEN)});
}

// A packed weight of values between -1 and 1, or -127 and 127.
PackedWeight packed(WeightType type, int64_t columns, int64_t depth) {
  float* const values = floats(columns * depth);
  if (type == WeightType::bfloat16)
    for (int64_t i = 0; i < columns * depth; ++i) std::memcpy((char*)values + 2 * i, (char*)(values + i) + 2, 2);
  if (type == WeightType::int8)
    for (int64_t i = 0; i < columns * depth; ++i) ((int8_t*)values)[i] = (int8_t)(127 * values[i]);
  const int32_t* const sums = (int32_t*)std::calloc(columns, sizeof(int32_t));
  return {values, type, columns, depth, floats(columns), sums, nullptr};
}

PackedLinear packed_linear(int64_t tokens, WeightType type, int64_t columns, int64_t depth,
                           Epilogue epilogue = Epilogue::none) {
  return {tokens, rows(tokens, depth), packed(type, columns, depth), vector(columns), epilogue, rows(tokens, columns)};
}

void packed_fp32(int64_t tokens, bool) {
  BERTFAST_SET::packed_linear(packed_linear(tokens, WeightType::float32, HIDDEN, HIDDEN));
}

void packed_bf16(int64_t tokens, bool) {
  BERTFAST_SET::packed_linear(packed_linear(tokens, WeightType::bfloat16, HIDDEN, HIDDEN));
}

void packed_int8(int64_t tokens, bool) {
  BERTFAST_SET::packed_linear(packed_linear(tokens, WeightType::int8, HIDDEN, HIDDEN));
}

struct Layer {
  PackedLinear qkv, dense, intermediate, output;
  AttentionForward attention;
  AddLayerNormForward norm;
};

}  // namespace

namespace bertfast::BERTFAST_SET {

// The kernels of a layer in the order of csrc/packed_operators.h, which is a file of PyTorch's; counted as a function.
[[gnu::noinline]] static void packed_layer(const Layer& layer) {
  BERTFAST_SET::packed_linear(layer.qkv);
  BERTFAST_SET::attention_forward(layer.attention);
  BERTFAST_SET::packed_linear(layer.dense);
  BERTFAST_SET::add_layer_norm_forward(layer.norm);
  BERTFAST_SET::packed_linear(layer.intermediate);
  BERTFAST_SET::packed_linear(layer.output);
  BERTFAST_SET::add_layer_norm_forward(layer.norm);
}

}  // namespace bertfast::BERTFAST_SET

namespace {

void packed_layer(int64_t tokens, bool) {
  const WeightType type = WeightType::float32;
  const int sequences = (int)(tokens / LENGTH);
  int32_t* const cu_seqlens = indices<int32_t>(sequences + 1, sequences + 1);
  for (int i = 0; i <= sequences; ++i) cu_seqlens[i] *= LENGTH;
  const auto tasks = attention_tasks(cu_seqlens, sequences, HEADS, UNLIMITED, 1, false);
  AttentionInputs inputs = attention_inputs(tokens, LENGTH, UNLIMITED, cu_seqlens, sequences, tasks);
  inputs.dropout = {};
  const AttentionForward attention{inputs, floats(tokens * HIDDEN), floats(HEADS * tokens)};
  const Layer layer{packed_linear(tokens, type, 3 * HIDDEN, HIDDEN),
                    packed_linear(tokens, type, HIDDEN, HIDDEN),
                    packed_linear(tokens, type, WIDE, HIDDEN, Epilogue::gelu),
                    packed_linear(tokens, type, HIDDEN, WIDE),
                    attention,
                    {tokens,
                     HIDDEN,
                     rows(tokens, HIDDEN),
                     rows(tokens, HIDDEN),
                     vector(HIDDEN),
                     vector(HIDDEN),
                     vector(HIDDEN),
                     EPS,
                     {},
                     rows(tokens, HIDDEN),
                     Rows{},
                     floats(tokens),
                     floats(tokens)}};
  BERTFAST_SET::packed_layer(layer);
}

struct Kernel {
  const char* name;
  void (*run)(int64_t tokens, bool backward);
};

constexpr Kernel KERNELS[] = {{"add_layer_norm", add_layer_norm},     {"bias_gelu", bias_gelu},
                              {"gelu_layer_norm", gelu_layer_norm},   {"embeddings", embeddings},
                              {"cross_entropy", cross_entropy},       {"attention", attention},
                              {"attention_window", attention_window}, {"rotary", rotary},
                              {"packed_fp32", packed_fp32},           {"packed_bf16", packed_bf16},
                              {"packed_int8", packed_int8},           {"packed_layer", packed_layer}};

}  // namespace

int main(int argc, char** argv) {
  if (argc == 4)
    for (const Kernel& kernel : KERNELS)
      if (std::strcmp(kernel.name, argv[1]) == 0)
        return kernel.run(std::atoll(argv[3]), std::strcmp(argv[2], "backward") == 0), 0;
  std::fprintf(stderr, "instructions KERNEL forward|backward TOKENS\n");
  return 2;
}
