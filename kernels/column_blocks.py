"""Shared by the activation kernels: a tile is a block of columns of several rows, and rows are not reduced.

H columns; BLOCK columns and ROWS rows of a tile.
"""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def tile_at(tile, tokens, H: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Return (row int64 [ROWS, 1], column [1, BLOCK], mask) of the tile-th group of rows and the program's columns."""
    row = (tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    if H % BLOCK == 0:
        return row, column, row < tokens
    else:
        return row, column, (row < tokens) & (column < H)


@triton.jit
def load_bias(bias_ptr, column, H: tl.constexpr):
    """Load the bias [H] at `column` [1, BLOCK] as fp32."""
    return tl.load(bias_ptr + column, mask=column < H, other=0.0).to(tl.float32)


def tile_config(columns: int, *tensors: Tensor, rows: int = 4) -> dict[str, int]:
    """Return H, BLOCK, ROWS and num_warps: a lane loads 16 bytes of each of the `rows` of a tile.

    Four rows of one tensor, or two of two, are enough loads in flight.
    """
    lane = 16 // max(tensor.element_size() for tensor in tensors)
    padded = triton.next_power_of_2(columns)
    block = next((size for size in (1024, 512, 256, 128) if columns % size == 0), min(padded, 1024))
    return {"H": columns, "BLOCK": block, "ROWS": rows, "num_warps": max(min(block // (32 * lane), 8), 1)}
