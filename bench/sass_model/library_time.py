"""The time of operators of PyTorch's libraries on a GPU, from the sizes of their tensors and assumed rates.

Their machine code is not simulated. A GEMM runs at an assumed rate in whole waves of tiles, a sort takes an assumed
time per pass, and all others read and write their tensors at the bandwidth of a copy.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.sass_model import constants
from bench.sass_model.constants import Gpu
from bench.sass_model.trace import MULTI_TENSOR, Call

_SINGLE = 4  # bytes of a partial sum


@dataclass(frozen=True)
class LibraryTime:
    """The time of an operator.

    Attributes:
        seconds: Its kernels, without the gaps between them.
        launches: Number of its kernels.
    """

    seconds: float
    launches: int


def library_time(call: Call, gpu: Gpu) -> LibraryTime:
    """Return the time of a library operator."""
    moved = (call.reads + call.writes) / gpu.copy_bandwidth
    if call.gemm is not None:
        found = gemm_time(*call.gemm, gpu)
        return LibraryTime(max(found.seconds, moved), found.launches)
    if call.name == "sort":
        return _sort_time(call.rows, call.element)
    if call.name.startswith(MULTI_TENSOR):
        launches = max(-(-call.chunks // constants.MULTI_TENSOR_BLOCKS), 1)
        return LibraryTime(max(moved, launches * constants.SHORTEST), launches)
    return LibraryTime(max(moved, constants.SHORTEST), 1)


def gemm_time(rows: int, columns: int, depth: int, gpu: Gpu) -> LibraryTime:
    """Return the time of a GEMM with the best of the assumed tiles: each wave of tiles takes as long as a full one.

    Where tiles are fewer than SMs, as in gradients of weights, several blocks share the sum of a tile, and another
    kernel adds their parts.
    """
    best = LibraryTime(float("inf"), 0)
    of_sm = constants.GEMM_FLOPS / gpu.sms
    for tile_rows, tile_columns, share in constants.GEMM_TILES:
        tiles = -(-rows // tile_rows) * -(-columns // tile_columns)
        for split in range(1, constants.GEMM_SPLITS + 1):
            waves = -(-tiles * split // gpu.sms)
            seconds = waves * 2 * tile_rows * tile_columns * depth / split / (share * of_sm)
            if split > 1:
                seconds += max(2 * split * rows * columns * _SINGLE / gpu.copy_bandwidth, constants.SHORTEST)
            if seconds < best.seconds:
                best = LibraryTime(seconds, 1 + (split > 1))
    return best


def _sort_time(keys: int, size: int) -> LibraryTime:
    """Return the time of sorting keys of `size` bytes."""
    if keys <= constants.SORT_IN_A_BLOCK:
        return LibraryTime(constants.SHORTEST, 1)
    others = constants.SORT_LAUNCHES_BESIDES_PASSES
    return LibraryTime(size * constants.SORT_PASS + others * constants.SHORTEST, size + others)
