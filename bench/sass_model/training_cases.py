"""More launches whose time is predicted: what a pre-training step runs besides the kernels of `cases.py`.

Embeddings and their gradients, the masked-LM head and its loss, and residual connections whose stream is fp32 while
GEMMs read bf16, as in training with autocast.

A batch has 32,768 tokens in sequences of 128, 15 % of them masked as in BERT (Devlin et al., 2019). How often a token
occurs in text follows no formula, so DISTINCT and WORD_BLOCKS are assumptions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from bench.sass_model.cases import HALF, SINGLE, TOKENS, Case, Launch, Options, _each_row, _summing, ceil_div
from bench.sass_model.control_flow import Choice
from bench.sass_model.kernel_time import Work
from bertfast.kernels.sum_by_index import _BLOCK

HIDDEN, VOCAB, POSITIONS, LENGTH = 768, 30_522, 512, 128
LOGITS = 30_528  # columns of the buffer of logits
CHUNK_ROWS = 2_560  # rows of logits at a time, of 5,000
DISTINCT = 9_000  # vocabulary entries that occur in a batch
MASKED = 3_932  # [MASK] tokens: 80 % of 15 %
WORD_BLOCKS = 400  # blocks of sorted positions with one vocabulary entry: [MASK], [CLS], [SEP] and frequent words
POSITION_BLOCKS = LENGTH * (TOKENS // LENGTH // _BLOCK - 1)  # the first and the last block of a position are shared
TABLES = "3 tables, dropout"
LOSS = f"{CHUNK_ROWS:,} rows of {VOCAB:,}"
EQUAL_BLOCKS = f"{WORD_BLOCKS + POSITION_BLOCKS:,} of {2 * TOKENS // _BLOCK:,} blocks"
LONGEST = f"{MASKED:,} [MASK]"
USED_POSITIONS = f"{LENGTH} positions"
WITH, WITHOUT = f"{DISTINCT:,} words with tokens", f"{VOCAB - DISTINCT:,} words without"
_INDICES = 5 * 8  # bytes per token: ids of three tables and two RNG coordinates
_SUM_ROWS = 4  # rows that `kernels/sum_by_index.py` reads at a time
_GRADIENT_PROGRAMS = 2  # along the rows of a chunk, as `kernels/linear_cross_entropy.py` computes it for 132 SMs

Element = tuple[torch.dtype, int, str]
BF16: Element = (torch.bfloat16, HALF, "bf16")
FP32: Element = (torch.float32, SINGLE, "fp32")


def training_launches() -> Iterator[Launch]:
    """Yield the launches."""
    yield _embeddings(BF16)
    yield _embeddings(FP32)
    yield _add_layer_norm_of_fp32_stream()
    yield _gelu_layer_norm()
    yield _cross_entropy()
    yield _linear_gelu()


def _rng() -> tuple[Any, ...]:
    ids = torch.zeros(64, dtype=torch.int64)
    return torch.zeros((), dtype=torch.int64), ids, ids, 256, 26


def _embeddings(element: Element) -> Launch:
    from bertfast.kernels import embeddings  # noqa: F401, registers the operations

    dtype, size, name = element
    row = HIDDEN * size

    def run() -> None:
        table, vector = torch.zeros(64, HIDDEN, dtype=dtype), torch.zeros(HIDDEN)
        ids, statistics = torch.zeros(64, dtype=torch.int64), torch.zeros(64)
        inputs = (table, table, table[:2], ids, ids, ids, vector)
        torch.ops.bertfast.triton_embeddings_forward(*inputs, vector, 1e-12, *_rng())
        torch.ops.bertfast.triton_embeddings_backward(table, *inputs, statistics, statistics, 0, *_rng())

    # Each word's row comes from DRAM once; the rows of positions stay in L2, and those of types in L1.
    words, statistics = DISTINCT * row, 2 * SINGLE

    def forward(options: Options) -> Work:
        loaded = _each_row(2 * row + _INDICES, row + statistics)(options)
        return replace(loaded, reads=words + TOKENS * _INDICES)

    def backward(options: Options) -> Work:
        loaded = _summing(3 * row + _INDICES + statistics, row)(options)
        return replace(loaded, reads=words + TOKENS * (row + _INDICES + statistics))

    cases = Case("embeddings_forward", TABLES, forward), Case("embeddings_backward", TABLES, backward)
    return Launch(f"embeddings, {name}", run, (*cases, *_sums(row)))


def _sums(row: int) -> Iterator[Case]:
    """Yield the cases of the sums by index of rows of so many bytes."""
    sums = HIDDEN * SINGLE  # bytes of a block's sum
    blocks = WORD_BLOCKS + POSITION_BLOCKS
    trips = {"memory": _BLOCK // _SUM_ROWS}
    whole = Work(blocks, Choice(trips), 0, blocks * _BLOCK * row, blocks * sums, blocks * _BLOCK * row)
    yield Case("sum_blocks", EQUAL_BLOCKS, lambda _: whole)
    empty, used = VOCAB - DISTINCT, DISTINCT
    yield Case("sum_groups", WITHOUT, lambda _: Work(empty, Choice({"memory": 0}), 0, 0, empty * row, 0))
    # Of most words there are at most four tokens, which are read at once; the other loops are charged once, too.
    single = (TOKENS - WORD_BLOCKS * _BLOCK) * row
    yield Case("sum_groups", WITH, lambda _: Work(used, Choice({"memory": 1}), 0, single, used * row, single))
    # The three loops of [MASK] together run as often as its two halves of a block and the sums of its others take.
    reads = MASKED // _BLOCK * sums + _BLOCK * row
    turns = ceil_div(2 * _BLOCK // _SUM_ROWS + ceil_div(MASKED // _BLOCK, _SUM_ROWS), 3)
    yield Case("sum_groups", LONGEST, lambda _: Work(1, Choice({"memory": turns}), 0, reads, row, reads))
    of_position = TOKENS // LENGTH
    reads_of_all = LENGTH * (_BLOCK * row + (of_position // _BLOCK - 1) * sums)
    turns_of_one = ceil_div(_BLOCK // _SUM_ROWS + ceil_div(of_position // _BLOCK - 1, _SUM_ROWS), 3)
    work = Work(LENGTH, Choice({"memory": turns_of_one}), 0, reads_of_all, LENGTH * row, reads_of_all)
    yield Case("sum_groups", USED_POSITIONS, lambda _: work)


def _add_layer_norm_of_fp32_stream() -> Launch:
    from bertfast.kernels import add_layer_norm  # noqa: F401, registers the operations

    def run() -> None:
        x, stream = torch.zeros(64, HIDDEN, dtype=torch.bfloat16), torch.zeros(64, HIDDEN)
        vector, statistics = torch.zeros(HIDDEN), torch.zeros(64)
        arguments = (x, stream, vector, vector, vector, 1e-12, *_rng(), torch.bfloat16)
        torch.ops.bertfast.triton_add_layer_norm_forward(*arguments)
        arguments = (stream, x, stream, vector, vector, statistics, statistics, *_rng(), x)
        torch.ops.bertfast.triton_add_layer_norm_backward(*arguments)

    half, single, statistics = HIDDEN * HALF, HIDDEN * SINGLE, 2 * SINGLE
    size = f"{HIDDEN} columns"
    cases = (
        Case("add_layer_norm_forward", size, _each_row(half + single, half + single + statistics)),
        Case("add_layer_norm_backward", size, _summing(2 * half + 2 * single + statistics, half + single)),
    )
    return Launch("add_layer_norm, fp32 stream, dropout", run, cases)


def _gelu_layer_norm() -> Launch:
    from bertfast.kernels import gelu_layer_norm  # noqa: F401, registers the operations

    def run() -> None:
        x, vector, statistics = torch.zeros(16, HIDDEN, dtype=torch.bfloat16), torch.zeros(HIDDEN), torch.zeros(16)
        torch.ops.bertfast.triton_gelu_layer_norm_forward(x, vector, vector, vector, 1e-12)
        torch.ops.bertfast.triton_gelu_layer_norm_backward(x, x, vector, vector, statistics, statistics)

    row, statistics = HIDDEN * HALF, 2 * SINGLE
    cases = (
        Case("gelu_layer_norm_forward", f"{HIDDEN} columns", _each_row(row, row + statistics)),
        Case("gelu_layer_norm_backward", f"{HIDDEN} columns", _summing(2 * row + statistics, row)),
    )
    return Launch("gelu_layer_norm", run, cases)


def _cross_entropy() -> Launch:
    """Return the launch of both kernels between the GEMMs of the loss, for one chunk of rows."""
    from bertfast.kernels import linear_cross_entropy  # noqa: F401, registers the operation

    def run() -> None:
        hidden, labels = torch.zeros(16, 8, dtype=torch.bfloat16), torch.zeros(16, dtype=torch.int64)
        weight, bias = torch.zeros(VOCAB, 8, dtype=torch.bfloat16), torch.zeros(VOCAB)
        arguments = (hidden, labels, weight, bias, labels, [True, True, True], torch.bfloat16)
        torch.ops.bertfast.triton_linear_cross_entropy_forward(*arguments)

    logits = CHUNK_ROWS * LOGITS * HALF

    def loss(options: Options) -> Work:
        trips = ceil_div(LOGITS, options["LANES"] * options["WIDTH"])
        biases = CHUNK_ROWS * LOGITS * SINGLE  # each block reads all of them, from L2
        return Work(CHUNK_ROWS, Choice({"memory": trips}), 0, logits, 0, logits + biases)

    def gradient(options: Options) -> Work:
        across, tiles = LOGITS // options["BLOCK"], ceil_div(CHUNK_ROWS, options["ROWS"])
        moved = logits + SINGLE * _GRADIENT_PROGRAMS * LOGITS  # partial sums are read and written, too
        choice = Choice({"memory": ceil_div(tiles, _GRADIENT_PROGRAMS)})
        return Work(across * _GRADIENT_PROGRAMS, choice, 0, moved, moved, moved)

    cases = Case("cross_entropy", LOSS, loss), Case("cross_entropy_gradient", LOSS, gradient)
    return Launch("cross_entropy", run, cases)


def _linear_gelu() -> Launch:
    from bertfast.kernels import linear_gelu  # noqa: F401, registers the operation

    columns = 4 * HIDDEN

    def run() -> None:
        x, weight = torch.zeros(16, HIDDEN, dtype=torch.bfloat16), torch.zeros(columns, HIDDEN, dtype=torch.bfloat16)
        torch.ops.bertfast.triton_linear_gelu_forward(x, weight, torch.zeros(columns), "none")

    def work(options: Options) -> Work:
        rows, across, depth = options["ROWS"], options["COLUMNS"], options["DEPTH"]
        blocks = ceil_div(TOKENS, rows) * ceil_div(columns, across)
        reads = (TOKENS + columns) * HIDDEN * HALF
        loads = blocks * (rows + across) * HIDDEN * HALF
        choice = Choice({"matmul": ceil_div(HIDDEN, depth)})
        return Work(blocks, choice, 2.0 * TOKENS * HIDDEN * columns, reads, 2 * TOKENS * columns * HALF, loads)

    return Launch("linear_gelu", run, (Case("linear_gelu_forward", f"{HIDDEN} x {columns:,}", work),))
