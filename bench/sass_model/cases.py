"""The launches whose time is predicted: the Triton kernels at BERT's and ModernBERT's shapes, in bf16.

A launch compiles kernels with small tensors, which gives the same machine code as large ones. Its cases say what the
kernels do with 32,768 tokens: blocks, iterations, floating-point operations and bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bench.sass_model.constants import H200
from bench.sass_model.control_flow import Choice
from bench.sass_model.kernel_time import Work
from bertfast.kernels.attention_tiles import tile_table
from bertfast.kernels.rows import _WARPS_PER_SM

TOKENS = 32_768
MIXED = tuple(range(4, 513, 4))  # lengths of sequences, 33,024 tokens together
HEADS, HEAD_DIMENSION = 12, 64
WIDE_HEADS = 6  # heads of dimension 128, together as wide
HALF, SINGLE = 2, 4  # bytes of an element
UNIT = TOKENS * HEADS * HEAD_DIMENSION * HALF  # bytes of q, k, v, o or a gradient of one
STATISTIC = SINGLE * TOKENS * HEADS  # bytes of the log-sum-exp, or of delta

Options = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One kernel of a launch at one size.

    Attributes:
        kernel: Its name.
        size: What the table says about the size.
        work: Returns what it does, from the options of its launch.
        pass_flop: Floating-point operations of the pass of which it is a part, if other kernels have the rest.
        lengths: Lengths of the sequences, if they differ; `work` is then that of all of them.
        work_of: Returns, for one of these lengths, the work of a batch in which all sequences have it.
    """

    kernel: str
    size: str
    work: Callable[[Options], Work]
    pass_flop: float | None = None
    lengths: tuple[int, ...] = ()
    work_of: Callable[[int], Callable[[Options], Work]] | None = None


@dataclass(frozen=True)
class Launch:
    """Calls that launch kernels, once each, and the cases of these kernels."""

    name: str
    run: Callable[[], object]
    cases: tuple[Case, ...]


def launches() -> Iterator[Launch]:
    """Yield every launch of the table."""
    for dropout in (False, True):
        yield _attention(128, (128,), dropout)
        yield _attention(512, (512, 300, 2048), dropout)
        yield _attention(512, (512,), dropout, heads=WIDE_HEADS)
    yield _windowed_attention()
    for dropout in (False, True):
        yield _add_layer_norm(768, dropout)
    yield _pre_norm(768)
    yield _bias_gelu(3072)
    yield _gated_activation(1152)
    yield _rotary()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _attention(
    bound: int, lengths: tuple[int, ...], dropout: bool, window: int | None = None, heads: int = HEADS
) -> Launch:
    from bertfast.kernels import attention, attention_backward  # noqa: F401, registers the operations

    dimension = HEADS * HEAD_DIMENSION // heads

    def run() -> None:
        qkv = torch.zeros(64, 3, 2, dimension, dtype=torch.bfloat16)
        o, lse = qkv.new_zeros(qkv[:, 0].shape), torch.zeros(qkv.shape[2], len(qkv))
        cu_seqlens = torch.tensor([0, 64], dtype=torch.int32)
        table = tile_table(cu_seqlens, len(qkv), bound)
        batch = (cu_seqlens, torch.zeros(1, dtype=torch.int64), table, bound, dimension**-0.5, False, window)
        rng = (torch.zeros((), dtype=torch.int64), 256, 26) if dropout else (None, 0, 0)
        torch.ops.bertfast.triton_attention_forward(qkv, *batch, *rng)
        torch.ops.bertfast.triton_attention_backward(o, qkv, o, lse, *batch, *rng)

    cases: list[Case] = []
    for length in lengths:
        size, matmul = f"length {length:,}", matmul_flop(length, window)
        cases.append(Case("attention_forward", size, _forward(length, window, heads)))
        if bound <= 128:
            cases.append(Case("attention_backward_short", size, _short(length)))
        else:
            cases += [
                Case("attention_d_q", size, _d_q(length, window, heads), 5 * matmul),
                Case("attention_d_kv", size, _d_kv(length, window, heads), 5 * matmul),
            ]
    if bound == 512 and window is None and heads == HEADS:
        cases += _mixed_cases()
    name = "attention" + (f", window {window}" if window else "") + (", dropout" if dropout else "")
    name += f", {heads} heads of {dimension}" if heads != HEADS else ""
    return Launch(name, run, tuple(cases))


def _mixed_cases() -> list[Case]:
    """Return the cases of a batch of sequences of 4, 8, … and 512 tokens."""
    size = f"lengths 4 to {max(MIXED)}"
    flop = 5.0 * 2 * HEADS * HEAD_DIMENSION * sum(length * length for length in MIXED)
    return [
        Case("attention_forward", size, _total(_forward, 2), lengths=MIXED, work_of=_forward),
        Case("attention_d_q", size, _total(_d_q, 3), flop, MIXED, _d_q),
        Case("attention_d_kv", size, _total(_d_kv, 4), flop, MIXED, _d_kv),
    ]


def _total(work_of: Callable[[int], Callable[[Options], Work]], matmuls: int) -> Callable[[Options], Work]:
    """Return the work for the sequences of MIXED: the bytes of as many tokens, and the FLOP of `matmuls`."""

    def work(options: Options) -> Work:
        uniform, share = work_of(max(MIXED))(options), sum(MIXED) / TOKENS
        flop = matmuls * 2.0 * HEADS * HEAD_DIMENSION * sum(length * length for length in MIXED)
        blocks = round(uniform.blocks * share)
        return Work(blocks, Choice(), flop, uniform.reads * share, uniform.writes * share, uniform.loads * share)

    return work


def matmul_flop(length: int, window: int | None) -> float:
    """Return the floating-point operations of one matmul, such as q kᵀ, for all tokens."""
    return 2.0 * TOKENS * HEADS * HEAD_DIMENSION * (length if window is None else min(length, 2 * window + 1))


def _windowed_attention() -> Launch:
    return _attention(512, (512,), False, window=64)


def _attended(block: int, step: int, length: int, window: int | None) -> int:
    """Return the keys that a block of queries visits, in whole steps; of a block in the middle if there is a window."""
    return length if window is None else min(ceil_div(2 * window + block, step) * step, ceil_div(length, step) * step)


def _forward(length: int, window: int | None = None, heads: int = HEADS) -> Callable[[Options], Work]:
    flop = 2 * matmul_flop(length, window)

    def work(options: Options) -> Work:
        rows, step = options["BLOCK_M"], options["BLOCK_N"]
        blocks = TOKENS // length * ceil_div(length, rows) * heads
        loads = blocks * (rows + 2 * _attended(rows, step, length, window)) * _row_bytes(heads)
        choice = _over_keys(rows, step, length, window, options["SPLIT"])
        return Work(blocks, choice, flop, 3 * UNIT, UNIT + _statistic_bytes(heads), loads)

    return work


def _over_keys(rows: int, step: int, length: int, window: int | None, split: bool) -> Choice:
    """Return the path of a loop over keys, whose last block is masked and outside the loop if it is `split`."""
    if window is not None or not split:
        return Choice({"matmul": ceil_div(_attended(rows, step, length, window), step), "memory": 0})
    return Choice({"matmul": length // step, "memory": 0}, take=frozenset({"matmul"} if length % step else ()))


def _short(length: int) -> Callable[[Options], Work]:
    flop = 5 * matmul_flop(length, None)

    def work(_: Options) -> Work:
        reads = 5 * UNIT + STATISTIC
        return Work(TOKENS // length * HEADS, Choice({"memory": 0}), flop, reads, 3 * UNIT, reads)

    return work


def _row_bytes(heads: int) -> int:
    """Return the bytes of a row of one head."""
    return HEADS * HEAD_DIMENSION // heads * HALF


def _statistic_bytes(heads: int) -> int:
    """Return the bytes of the log-sum-exp, or of delta, with so many heads."""
    return STATISTIC * heads // HEADS


def _d_q(length: int, window: int | None = None, heads: int = HEADS) -> Callable[[Options], Work]:
    flop = 3 * matmul_flop(length, window)

    def work(options: Options) -> Work:
        rows, step = options["BLOCK_M"], options["BLOCK_N"]
        blocks = TOKENS // length * ceil_div(length, rows) * heads
        loads = blocks * (3 * rows + 2 * _attended(rows, step, length, window)) * _row_bytes(heads)
        choice, statistic = _over_keys(rows, step, length, window, options["SPLIT"]), _statistic_bytes(heads)
        return Work(blocks, choice, flop, 5 * UNIT + statistic, UNIT + statistic, loads)

    return work


def _d_kv(length: int, window: int | None = None, heads: int = HEADS) -> Callable[[Options], Work]:
    flop = 4 * matmul_flop(length, window)

    def work(options: Options) -> Work:
        keys, step = options["BLOCK_N"], options["BLOCK_M"]
        blocks = TOKENS // length * ceil_div(length, keys) * heads
        queries = ceil_div(_attended(keys, step, length, window), step)
        loads = blocks * (2 * keys + 2 * queries * step) * _row_bytes(heads)
        reads = 4 * UNIT + 2 * _statistic_bytes(heads)
        return Work(blocks, Choice({"matmul": queries}), flop, reads, 2 * UNIT, loads)

    return work


def _add_layer_norm(hidden: int, dropout: bool) -> Launch:
    from bertfast.kernels import add_layer_norm  # noqa: F401, registers the operations

    def run() -> None:
        x, vector, statistics = torch.zeros(16, hidden, dtype=torch.bfloat16), torch.zeros(hidden), torch.zeros(16)
        ids = torch.zeros(16, dtype=torch.int64)
        rng = (torch.zeros((), dtype=torch.int64), ids, ids, 256, 26) if dropout else (None, None, None, 0, 0)
        torch.ops.bertfast.triton_add_layer_norm_forward(x, x, vector, vector, vector, 1e-12, *rng, None)
        torch.ops.bertfast.triton_add_layer_norm_backward(x, x, x, vector, vector, statistics, statistics, *rng, None)

    row, name = hidden * HALF, "add_layer_norm" + (", dropout" if dropout else "")
    forward = _each_row(2 * row, row + 2 * SINGLE)
    return _row_kernels(name, hidden, run, forward, _summing(3 * row + 2 * SINGLE, (1 + dropout) * row))


def _pre_norm(hidden: int) -> Launch:
    from bertfast.kernels import pre_norm  # noqa: F401, registers the operations

    def run() -> None:
        x, gamma, statistics = torch.zeros(16, hidden, dtype=torch.bfloat16), torch.zeros(hidden), torch.zeros(16)
        rng = (None, None, None, 0, 0)
        torch.ops.bertfast.triton_pre_norm_forward(x, x, None, gamma, None, 1e-12, False, x.dtype, *rng)
        arguments = (x, x, x, gamma, statistics, statistics, False, False, x.dtype)
        torch.ops.bertfast.triton_pre_norm_backward(*arguments, *rng)

    row = hidden * HALF
    forward = _each_row(2 * row, 2 * row + 2 * SINGLE)
    return _row_kernels("pre_norm", hidden, run, forward, _summing(3 * row + 2 * SINGLE, row))


def _row_kernels(
    name: str,
    columns: int,
    run: Callable[[], object],
    forward: Callable[[Options], Work],
    backward: Callable[[Options], Work],
) -> Launch:
    """Return the launch of both kernels of a row operation; after a comma, `name` has what is special in it."""
    operation, size = name.partition(",")[0], f"{columns:,} columns"
    cases = Case(f"{operation}_forward", size, forward), Case(f"{operation}_backward", size, backward)
    return Launch(name, run, cases)


def _programs(options: Options) -> int:
    """Return the programs of a row kernel that sums over rows, if there are enough tiles."""
    warps: int = options["num_warps"]
    return max(_WARPS_PER_SM // warps, 1) * H200.sms


def _each_row(reads: int, writes: int) -> Callable[[Options], Work]:
    """Return the work of a kernel whose blocks have ROWS rows; bytes per row."""

    def work(options: Options) -> Work:
        blocks = ceil_div(TOKENS, options["ROWS"])
        return Work(blocks, Choice(), 0, reads * TOKENS, writes * TOKENS, reads * TOKENS)

    return work


def _summing(reads: int, writes: int) -> Callable[[Options], Work]:
    """Return the work of a kernel whose resident blocks iterate over tiles of ROWS rows; bytes per row."""

    def work(options: Options) -> Work:
        tiles = ceil_div(TOKENS, options["ROWS"])
        blocks = min(tiles, _programs(options))
        choice = Choice({"memory": ceil_div(tiles, blocks)})
        return Work(blocks, choice, 0, reads * TOKENS, writes * TOKENS, reads * TOKENS)

    return work


def _column_tiles(columns: int, reads: int, writes: int, summing: bool) -> Callable[[Options], Work]:
    """Return the work of an activation kernel, whose tiles are BLOCK of `columns` columns; bytes per row."""

    def work(options: Options) -> Work:
        across, tiles = ceil_div(columns, options["BLOCK"]), ceil_div(TOKENS, options["ROWS"])
        down = ceil_div(min(tiles * across, _programs(options)), across) if summing else tiles
        choice = Choice({"memory": ceil_div(tiles, down)} if summing else {})
        return Work(down * across, choice, 0, reads * TOKENS, writes * TOKENS, reads * TOKENS)

    return work


def _bias_gelu(columns: int) -> Launch:
    from bertfast.kernels import bias_gelu  # noqa: F401, registers the operations

    def run() -> None:
        x, bias = torch.zeros(16, columns, dtype=torch.bfloat16), torch.zeros(columns)
        torch.ops.bertfast.triton_bias_gelu_forward(x, bias, "none")
        torch.ops.bertfast.triton_bias_gelu_backward(x, x, bias, "none")

    row = columns * HALF
    forward, backward = _column_tiles(columns, row, row, False), _column_tiles(columns, 2 * row, row, True)
    return _row_kernels("bias_gelu", columns, run, forward, backward)


def _gated_activation(columns: int) -> Launch:
    from bertfast.kernels import gated_activation  # noqa: F401, registers the operations

    def run() -> None:
        x, d_y = torch.zeros(16, 2 * columns, dtype=torch.bfloat16), torch.zeros(16, columns, dtype=torch.bfloat16)
        torch.ops.bertfast.triton_gated_activation_forward(x, None, "gelu")
        torch.ops.bertfast.triton_gated_activation_backward(d_y, x, None, "gelu")

    row = columns * HALF
    forward, backward = _column_tiles(columns, 2 * row, row, False), _column_tiles(columns, 3 * row, 2 * row, True)
    return _row_kernels("gated_activation", columns, run, forward, backward)


def _rotary() -> Launch:
    from bertfast.kernels import rotary  # noqa: F401, registers the operations

    def run() -> None:
        qkv, table = torch.zeros(16, 3, HEADS, HEAD_DIMENSION, dtype=torch.bfloat16), torch.zeros(16, HEAD_DIMENSION)
        torch.ops.bertfast.triton_rotary_forward(qkv, table)

    def work(options: Options) -> Work:
        reads = 3 * UNIT + SINGLE * TOKENS * HEAD_DIMENSION
        return Work(ceil_div(3 * HEADS * TOKENS, options["ROWS"]), Choice(), 0, reads, 3 * UNIT, reads)

    return Launch("rotary", run, (Case("rotary", f"{HEADS} heads of {HEAD_DIMENSION}", work),))
