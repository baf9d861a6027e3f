"""Functions of `test_compiled_kernels.py` that run in separate processes, which must be able to import them."""

import torch
import triton
import triton.language as tl

from bench.sass_model import ahead_of_time


@triton.jit
def attention_like_kernel(x_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + offsets)
    tl.store(x_ptr + offsets, tl.dot(x, tl.dot(x, x).to(x.dtype)).to(x.dtype))


def compile_attention_like(size: int, options: dict) -> list[ahead_of_time.Compiled]:
    x = torch.zeros(size, size, dtype=torch.bfloat16)
    case = ("bf16", lambda: attention_like_kernel[(1,)](x, BLOCK=size, **options))
    return ahead_of_time.compile_cases(90, [case])


def compile_batches() -> list[ahead_of_time.Compiled]:
    return ahead_of_time.compile_cases(90, [("ten batches", run_batches)])


def run_batches() -> None:
    """Forward and backward of ten batches: sizes that are 1, divisible by 16 and neither, and every kind of seed."""
    from bertfast.kernels import add_layer_norm, attention, attention_backward, bias_gelu  # noqa: F401
    from bertfast.ops.dropout import Dropout
    from bertfast.ops.sequences import Sequences

    launch, bf16 = torch.ops.bertfast, torch.bfloat16
    batches = [[1], [16], [17, 15], [100], [300, 1], [500], [512, 512], [2] * 16, [3] * 33, [250, 6, 256]]
    for number, lengths in enumerate(batches):
        sequences = Sequences.from_lengths(lengths, max_seqlen_bound=512)
        # A threshold of 1, of 16 and others; an operation of 0, whose counter word is 0, and others.
        p = (1 / 256, 16 / 256, 0.1)[number % 3]
        dropout = Dropout(p, torch.tensor(5), number, sequences.token_sequence_ids, sequences.position)
        rng = (dropout.seed, dropout.counter_word, dropout.threshold)
        qkv = torch.zeros(sequences.capacity, 3, 2, 64, dtype=bf16)
        o, lse = qkv.new_zeros(qkv[:, 0].shape), torch.zeros(qkv.shape[2], len(qkv))
        batch = (sequences.cu_seqlens, sequences.sequence_ids, sequences.tile_table, 512, 0.125, False, None)
        launch.triton_attention_forward(qkv, *batch, *rng)
        launch.triton_attention_backward(o, qkv, o, lse, *batch, *rng)
        x, vector, statistics = qkv.new_zeros(len(qkv), 128), torch.zeros(128), torch.zeros(len(qkv))
        rng = (dropout.seed, dropout.sequence_ids, dropout.positions, dropout.counter_word, dropout.threshold)
        launch.triton_add_layer_norm_forward(x, x, vector, vector, vector, 1e-12, *rng)
        launch.triton_add_layer_norm_backward(x, x, x, vector, vector, statistics, statistics, *rng)
        launch.triton_bias_gelu_forward(x, vector, "none")
        launch.triton_bias_gelu_backward(x, x, vector, "none")
