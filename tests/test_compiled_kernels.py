"""`bench/compiled_kernels.py` notices what is wrong with a compiled kernel, and batches of all sizes share kernels."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))
import ahead_of_time  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets")


@triton.jit
def attention_like_kernel(x_ptr, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + place)
    tl.store(x_ptr + place, tl.dot(x, tl.dot(x, x).to(x.dtype)).to(x.dtype))


def in_a_process(function: Callable):
    """Call `function` in a process of its own, since the driver that launches nothing stays in use."""
    _functions.append(function)  # the process is a copy of this one: nothing has to be pickled
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        return pool.submit(_call_last).result()


_functions: list[Callable] = []


def _call_last():
    return _functions[-1]()


def compiled(kernel, *arguments, size: int = 64, **options) -> ahead_of_time.Compiled:
    x = torch.zeros(size, size, dtype=torch.bfloat16)
    case = ("bf16", lambda: kernel[(1,)](x, *arguments, BLOCK=size, **options))
    (row,) = in_a_process(lambda: ahead_of_time.compile_cases(90, [case]))
    return row


def test_a_kernel_without_fault_has_none():
    row = compiled(attention_like_kernel)
    assert row.tensor_core == "HGMMA"
    assert row.faults() == []


def test_a_spill_is_a_fault():
    row = compiled(attention_like_kernel, size=128, num_warps=1)
    assert "instructions spill registers" in row.faults()[0]


def test_serialised_wgmma_are_a_fault_and_other_warnings_are_not():
    """By ptxas's own words, since it is up to its heuristics which kernels it says them of."""
    log = "ptxas info    : ({}) Potential Performance Loss: wgmma.mma_async instructions are serialized due to {}"
    serialised = log.format("C7515", "ill formed pipeline stage in the function") + "\n" + log.format("C7510", "a call")
    assert ahead_of_time.serialised_wgmma(serialised) == ["C7510", "C7515"]
    assert ahead_of_time.serialised_wgmma("ptxas info    : (C7519) Potential Performance Loss: a wait") == []
    row = replace(compiled(attention_like_kernel), serialised=["C7515"])
    assert row.faults() == ["ptxas serialises its wgmma (C7515)"]


def test_shared_memory_beyond_the_chip_other_tensor_cores_and_hazards_are_faults():
    row = compiled(attention_like_kernel)
    assert "more than the chip's 227 KiB" in replace(row, shared_memory=300 << 10).faults()[0]
    assert replace(row, tensor_core="HMMA").faults() == ["its matmuls run on HMMA"]
    assert replace(row, tensor_core="").faults() == ["its matmuls run on no tensor core"]
    assert replace(row, hazards=["FADD reads the accumulator"]).faults() == ["FADD reads the accumulator"]


def run_batches() -> None:
    """Forward and backward of ten batches: sizes that are 1, divisible by 16 and neither, and every kind of seed."""
    from bertfast.dropout import Dropout
    from bertfast.kernels import add_layer_norm, attention, attention_backward, bias_gelu  # noqa: F401
    from bertfast.sequences import Sequences

    launch, bf16 = torch.ops.bertfast, torch.bfloat16
    batches = [[1], [16], [17, 15], [100], [300, 1], [500], [512, 512], [2] * 16, [3] * 33, [250, 6, 256]]
    for number, lengths in enumerate(batches):
        sequences = Sequences.from_lengths(lengths, max_seqlen_bound=512)
        # A threshold of 1, of 16 and others; an operation of 0, whose counter word is 0, and others.
        p = (1 / 256, 16 / 256, 0.1)[number % 3]
        dropout = Dropout(p, torch.tensor(5), number, sequences.token_sequence_ids, sequences.position)
        rng = (dropout.seed, dropout.word, dropout.threshold)
        qkv = torch.zeros(sequences.capacity, 3, 2, 64, dtype=bf16)
        o, lse = qkv.new_zeros(qkv[:, 0].shape), torch.zeros(qkv.shape[2], len(qkv))
        batch = (sequences.cu_seqlens, sequences.sequence_ids, sequences.tile_table, 512, 0.125, False, None)
        launch.triton_attention_forward(qkv, *batch, *rng)
        launch.triton_attention_backward(o, qkv, o, lse, *batch, *rng)
        x, vector, statistics = qkv.new_zeros(len(qkv), 128), torch.zeros(128), torch.zeros(len(qkv))
        rng = (dropout.seed, dropout.sequence_number, dropout.position, dropout.word, dropout.threshold)
        launch.triton_add_layer_norm_forward(x, x, vector, vector, vector, 1e-12, *rng)
        launch.triton_add_layer_norm_backward(x, x, x, vector, vector, statistics, statistics, *rng)
        launch.triton_bias_gelu_forward(x, vector, "none")
        launch.triton_bias_gelu_backward(x, x, vector, "none")


def test_batches_of_all_sizes_share_kernels():
    """Nor is a dropout threshold of 1 an error, as where Triton makes a constant of it."""
    kernels = in_a_process(lambda: ahead_of_time.compile_cases(90, [("ten batches", run_batches)]))
    counts = Counter(row.kernel for row in kernels)
    assert set(counts.values()) == {1}, counts
    assert len(counts) == 8  # attention has four, the two others two each


def test_a_chip_that_it_does_not_know_is_refused():
    ran = subprocess.run(
        [sys.executable, BENCH / "compiled_kernels.py", "--chips", "75"], capture_output=True, text=True
    )
    assert ran.returncode == 2
    assert "invalid choice: 75" in ran.stderr
