"""The tile table of the attention kernels, built on the device once per batch and read by every layer."""

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 128
"""Rows of a tile. The block sizes of the kernels divide it."""


def tile_table(cu_seqlens: Tensor, capacity: int, max_seqlen_bound: int, tile_rows: int = TILE) -> Tensor:
    """Split the sequences of a packed batch into tiles of rows, those of the longest sequences first.

    The longest come first, so that the last programs to run are short. Everything is computed on the device of
    `cu_seqlens`, whose values the host does not read: a CUDA graph can capture it, and the result is deterministic.

    Args:
        cu_seqlens: int32 [S + 1], start of each sequence.
        capacity: T, slots of a packed activation, padding slots included.
        max_seqlen_bound: No sequence is longer.
        tile_rows: Rows of a tile.

    Returns:
        int32 [N + 1, 4] of (sequence, its first slot, its length, the tile's first row in the sequence), where N is the
        maximum number of tiles of such a batch. Unused entries have a first row that is not below the length. The last
        entry is (S, first padding slot, number of padding slots, 0).
    """
    sequences = cu_seqlens.shape[0] - 1
    # A sequence has at most ceil(bound / rows) tiles, and all of them have at most T // rows full ones and S others.
    tiles = min(sequences * -(-max_seqlen_bound // tile_rows), capacity // tile_rows + sequences)
    # F.pad would turn capacity into a Python number, and torch.compile would build a graph for each value.
    lengths = torch.cat([cu_seqlens, cu_seqlens.new_full((1,), capacity)]).diff()  # [S + 1], of padding slots last
    sorted_lengths, order = lengths[:-1].sort(descending=True, stable=True)
    counts = (sorted_lengths + (tile_rows - 1)) // tile_rows
    ends = counts.cumsum(0, dtype=cu_seqlens.dtype)
    # Tile t belongs to the sequence whose range [end - count, end) holds t; an unused one, to the last one.
    tile = torch.arange(tiles, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    rank = torch.searchsorted(ends, tile, right=True).clamp(max=max(sequences - 1, 0))
    first = (tile - (ends - counts)[rank]) * tile_rows
    sequence = torch.cat([order[rank], order.new_full((1,), sequences)])
    columns = (sequence, cu_seqlens[sequence], lengths[sequence], F.pad(first, (0, 1)))
    return torch.stack([column.to(torch.int32) for column in columns], 1)
