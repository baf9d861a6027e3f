"""Functions of tests that compile kernels, which run in separate processes that must be able to import them."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
import triton
import triton.language as tl

from bench.sass_model import ahead_of_time, kernel_time, predict
from bench.sass_model.cases import launches
from bench.sass_model.pipes import Kind


def in_a_process(function: Callable, *arguments):
    """Call `function` in a separate process, because the driver that launches nothing stays active.

    The process is spawned, because PyTorch's threads do not survive a fork.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


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


def predict_launch(name: str) -> list[predict.Row]:
    """Return the rows of the launches of that name."""
    return [
        row for launch in launches() if launch.name == name for row in predict.rows(launch, predict.compiled(launch))
    ]


def count_wgmma(length: int) -> dict[str, int]:
    """Return by kernel how many wgmma a warp executes for sequences of this length, in the launch of up to 2,048."""
    launch = next(one for one in launches() if any(f"{length:,}" in case.size for case in one.cases))
    code: dict[str, tuple[str, dict]] = {}

    def keep(kernel, _log, options) -> None:
        code[kernel.name.removesuffix("_kernel")] = ahead_of_time.disassemble(kernel.asm["cubin"])[1], options

    with ahead_of_time.compile_only(90, keep):
        launch.run()
    counts = {}
    for case in launch.cases:
        if case.size == f"length {length:,}":
            listing, options = code[case.kernel]
            steps = kernel_time.steps(listing, case.work(options).choice)
            counts[case.kernel] = sum(step.kind == Kind.WGMMA for step in steps)
    return counts


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
