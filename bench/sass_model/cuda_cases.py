"""The CUDA C++ kernels whose time is predicted, at the shapes of `cases.py`, in bf16.

Attention's blocks are persistent: on each sub-partition a warp of either consumer, and one of the producer's warpgroup,
which is left out unless it computes delta: the producer itself only issues TMA loads. `csrc/cuda/` says how work is
divided; the constants here repeat it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from bench.sass_model.cases import (
    HALF,
    HEAD_DIMENSION,
    HEADS,
    MIXED,
    SINGLE,
    STATISTIC,
    TOKENS,
    UNIT,
    ceil_div,
    matmul_flop,
)
from bench.sass_model.constants import H200
from bench.sass_model.control_flow import Choice
from bench.sass_model.kernel_time import Work

BLOCK, STEP = 128, 64  # queries or keys of both consumers, and of one wgmma
ATTENTION_WARPS = 12
ROW_BLOCKS_PER_SM = {"forward": 9, "backward": 5}  # of add_layer_norm at 768 columns, as csrc/cuda/rows.cuh computes it
GELU_BLOCKS_PER_SM = {"forward": 32, "backward": 4}  # csrc/cuda/bias_gelu.cu, also the next line
GELU_ROWS, GELU_COLUMNS = 4, 1024
_WHOLE = 512  # tokens up to which a work tile is a sequence
_PREFETCHED = 256  # tokens up to which the backward pass has room for two blocks of keys
_TILE = BLOCK * HEAD_DIMENSION * HALF  # bytes of BLOCK rows of one head
_FORWARD, _KEYS = "attention_forward_kernel<BFloat16, 64>", "attention_keys_kernel<BFloat16, 64, {}>"
_NOWHERE = {"memory": 0, "other": 0}  # loops that no case runs: over padding slots, and waits for barriers in memory


@dataclass(frozen=True)
class CudaCase:
    """One kernel at one size.

    Attributes:
        kernel: Its name with template arguments, as `c++filt` prints it.
        case: What the table says about the size.
        warps: Warps of a block.
        shared_memory: Bytes of dynamic shared memory of a block.
        work: What a launch does.
        pass_flop: Floating-point operations of the pass of which it is a part, if other kernels have the rest.
        lengths: Lengths of the sequences in their order, if they differ; `work` is then that of all of them.
        work_of: Returns, for one of these lengths, the work of a batch in which all sequences have it.
    """

    kernel: str
    case: str
    warps: int
    shared_memory: int
    work: Work
    pass_flop: float | None = None
    lengths: tuple[int, ...] = ()
    work_of: Callable[[int], Work] | None = None


def cuda_cases() -> Iterator[CudaCase]:
    """Yield all cases, the kernels of one pass one after another."""
    for dropout in (False, True):
        for length in (128, 512, 2048):
            yield _forward(length, dropout)
            yield from _backward(length, dropout)
        yield _forward(300, dropout)
        yield _mixed(_FORWARD, dropout, partial(_forward_work, dropout=dropout), 2)
        yield from _backward(300, dropout)
        yield _mixed(_KEYS.format(_WHOLE), dropout, partial(_keys_work, dropout=dropout, bound=_WHOLE), 5)
    for dropout in (False, True):
        yield from _add_layer_norm(768, dropout)
    yield from _bias_gelu(3072)


def _attention(kernel: str, length: int, dropout: bool, work: Work, pass_flop: float | None = None) -> CudaCase:
    case = f"length {length:,}" + (", dropout" if dropout else "")
    return CudaCase(kernel, case, ATTENTION_WARPS, 224 << 10, work, pass_flop)


def _persistent(tiles: int) -> tuple[int, int]:
    """Return the blocks that share work tiles, and the tiles of the block that has most."""
    blocks = min(tiles, H200.sms)
    return blocks, ceil_div(tiles, blocks)


def _consumers(trips: dict[str, int], dropout: bool, masked: bool = False, loads: bool = False) -> tuple[Choice, ...]:
    """Return the paths of both consumers.

    If `masked`, the last tile of keys is, which is computed after the loop; `loads`: they read global memory.
    """
    take, avoid = {"matmul", "store"}, {"mask"}
    take |= {"load"} if dropout or loads else set()
    (take if dropout else avoid).add("dropout")
    every = trips | _NOWHERE
    outside = Choice(every, frozenset(take | {"mask"}), frozenset(avoid - {"mask"})) if masked else None
    return (Choice(every, frozenset(take), frozenset(avoid), outside),) * 2


def _statistics_warp(steps: int, key_blocks: int, tiles: int) -> Choice:
    """Return the path of a warp that computes delta for the consumers.

    It does so in every block of keys here, not only in the first. The loop over padding slots is of the kind of its
    inner one, so it runs a few times, too.
    """
    counts = HEAD_DIMENSION // 32, steps, key_blocks, tiles  # inner loops first
    trips = {"outer " * depth + "memory": count for depth, count in enumerate(counts)} | {"other": 0}
    others = {"outer " * depth + kind: 0 for depth in range(3) for kind in ("matmul", "TMA")}  # of other warps
    return Choice(trips | others, frozenset({"store"}))


def _forward(length: int, dropout: bool) -> CudaCase:
    return _attention(_FORWARD, length, dropout, _forward_work(length, dropout))


def _forward_work(length: int, dropout: bool) -> Work:
    whole, across = length <= _WHOLE, ceil_div(length, BLOCK)
    count = TOKENS // length * HEADS * (1 if whole else across)
    blocks, tiles = _persistent(count)
    # The last tile of keys is computed after the loop.
    trips = {"matmul": across - 1, "outer matmul": across if whole else 1, "outer outer matmul": tiles}
    return Work(
        blocks,
        Choice(),
        2 * matmul_flop(length, None),
        3 * UNIT,
        UNIT + STATISTIC,
        UNIT + count * 2 * across * _TILE,
        _consumers(trips, dropout, masked=length % BLOCK > 0),
        tiles=tiles,
        waits=1,
        awaited=3 * _TILE,
    )


def _mixed(kernel: str, dropout: bool, work_of: Callable[[int], Work], matmuls: int) -> CudaCase:
    """Return the case of the sequences of MIXED, each of which is one work tile per head.

    In the backward pass rows beyond a sequence's end are neither zeroed nor masked here.
    """
    share, uniform = sum(MIXED) / TOKENS, work_of(max(MIXED))
    flop = matmuls * 2.0 * HEADS * HEAD_DIMENSION * sum(length * length for length in MIXED)
    total = replace(uniform, flop=flop, reads=uniform.reads * share, writes=uniform.writes * share)
    case = f"lengths 4 to {max(MIXED)}" + (", dropout" if dropout else "")
    return CudaCase(kernel, case, ATTENTION_WARPS, 224 << 10, total, lengths=MIXED, work_of=work_of)


def _backward(length: int, dropout: bool) -> Iterator[CudaCase]:
    """Yield the kernel over keys, which computes all gradients up to 512 tokens; else also delta and queries."""
    fused, flop = length <= _WHOLE, 5 * matmul_flop(length, None)
    if not fused:
        yield _delta(length, dropout, flop)
    yield _keys(length, dropout, fused, flop)
    if not fused:
        yield _queries(length, dropout, flop)


def _delta(length: int, dropout: bool, flop: float) -> CudaCase:
    warps = 8
    across = TOKENS * HEADS * HEAD_DIMENSION // 8 // (32 * warps)
    blocks = min(across, 8 * H200.sms)
    choice = Choice({"memory": ceil_div(across, blocks)}, frozenset({"load", "store"}))
    work = Work(blocks, choice, 0, 2 * UNIT, STATISTIC, 2 * UNIT)
    case = f"length {length:,}" + (", dropout" if dropout else "")
    return CudaCase("delta_kernel<BFloat16, 64>", case, warps, 0, work, flop)


def _keys(length: int, dropout: bool, fused: bool, flop: float) -> CudaCase:
    bound = 0 if not fused else _PREFETCHED if length <= _PREFETCHED else _WHOLE
    return _attention(_KEYS.format(bound), length, dropout, _keys_work(length, dropout, bound), flop)


def _keys_work(length: int, dropout: bool, bound: int) -> Work:
    """Return the work of the kernel for sequences of up to `bound` tokens; of any length if it is 0."""
    fused, across, steps = bound > 0, ceil_div(length, BLOCK), ceil_div(length, STEP)
    blocks, tiles = _persistent(TOKENS // length * HEADS * (1 if fused else across))
    key_blocks = across if fused else 1  # of a work tile
    trips = {"matmul": steps - 1, "outer matmul": key_blocks, "outer outer matmul": tiles}
    loads = TOKENS // length * HEADS * across * (2 + 2 * across) * _TILE
    roles = _consumers(trips, dropout)
    if fused:
        roles += (_statistics_warp(steps, key_blocks, tiles),)
    return Work(
        blocks,
        Choice(),
        (5 if fused else 4) * matmul_flop(length, None),
        (5 if fused else 4) * UNIT + (1 if fused else 2) * STATISTIC,  # o, or delta
        (3 if fused else 2) * UNIT,
        loads + (UNIT if fused else 0),
        roles,
        tiles=tiles,
        waits=tiles * key_blocks if bound == _WHOLE else 1,
        awaited=2 * _TILE,
    )


def _queries(length: int, dropout: bool, flop: float) -> CudaCase:
    across = ceil_div(length, BLOCK)
    blocks, tiles = _persistent(TOKENS // length * HEADS * across)
    trips = {"matmul": ceil_div(length, STEP) - 1, "outer matmul": tiles}
    loads = TOKENS // length * HEADS * across * (2 + 2 * across) * _TILE
    work = Work(
        blocks,
        Choice(),
        3 * matmul_flop(length, None),
        4 * UNIT + 2 * STATISTIC,
        UNIT,
        loads,
        _consumers(trips, dropout, loads=True),
        waits=tiles,
        awaited=2 * _TILE,
    )
    return _attention("attention_queries_kernel<BFloat16, 64>", length, dropout, work, flop)


def _add_layer_norm(columns: int, dropout: bool) -> Iterator[CudaCase]:
    warps, row = ceil_div(columns, 256), columns * HALF
    take = frozenset({"load", "store", *(["dropout"] if dropout else [])})
    for name, reads, writes in (
        ("forward", 2 * row, row + 2 * SINGLE),
        ("backward", 3 * row + 2 * SINGLE, (1 + dropout) * row),
    ):
        blocks = min(ROW_BLOCKS_PER_SM[name] * H200.sms, TOKENS)
        trips = {"memory": ceil_div(TOKENS, blocks), "other": 0}
        # Conversions of fp16 are where a copy of another type than y is read or written; there is none.
        absent = frozenset({"half"} if dropout else {"half", "dropout"})
        choice = Choice(trips, take, never=absent)
        kernel = f"add_layer_norm_{name}_kernel<BFloat16, BFloat16, RowShape<{warps}, 1, true>>"
        size = f"{columns:,} columns" + (", dropout" if dropout else "")
        work = Work(blocks, choice, 0, reads * TOKENS, writes * TOKENS, reads * TOKENS)
        yield CudaCase(kernel, size, warps, 0, work)


def _bias_gelu(columns: int) -> Iterator[CudaCase]:
    warps, row, across = 4, columns * HALF, ceil_div(columns, GELU_COLUMNS)
    for name, reads in (("forward", row), ("backward", 2 * row)):
        down = min(ceil_div(GELU_BLOCKS_PER_SM[name] * H200.sms, across), ceil_div(TOKENS, GELU_ROWS))
        trips = {"memory": ceil_div(TOKENS, GELU_ROWS * down), "other": 0}
        choice = Choice(trips, frozenset({"load", "store"}), frozenset({"tanh"}))
        work = Work(down * across, choice, 0, reads * TOKENS, row * TOKENS, reads * TOKENS)
        yield CudaCase(f"bias_gelu_{name}_kernel<BFloat16, true, false>", f"{columns:,} columns", warps, 0, work)
