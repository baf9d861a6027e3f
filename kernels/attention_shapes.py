"""Tile shapes of the attention kernels: a table, by head dimension and longest sequence, for each family of chips.

Every entry compiles without a spill for its chips under Triton 3.6 and 3.7, with and without dropout
(`bench/results/compiled_kernels.md`). Which is fastest a GPU has yet to say.
"""

from torch import Tensor

# kernel: {head dimension: [(longest sequence, queries, keys, warps), …]}, the first that is long enough.
_ANY = 1 << 31
_HALF = {
    "forward": {
        32: [(32, 32, 32, 2), (128, 64, 64, 4), (_ANY, 128, 64, 8)],
        64: [(32, 32, 32, 2), (128, 64, 64, 4), (_ANY, 128, 64, 8)],
        128: [(32, 32, 32, 2), (64, 64, 64, 4), (_ANY, 128, 64, 8)],
    },
    "short": {
        32: [(32, 32, 32, 2), (64, 64, 64, 4), (_ANY, 128, 128, 8)],
        64: [(32, 32, 32, 2), (64, 64, 64, 4), (_ANY, 128, 128, 8)],
        128: [(32, 32, 32, 2), (_ANY, 64, 64, 4)],
    },
    "d_q": {32: [(_ANY, 128, 64, 8)], 64: [(_ANY, 128, 64, 8)], 128: [(_ANY, 128, 64, 8)]},
    "d_kv": {32: [(_ANY, 64, 128, 8)], 64: [(_ANY, 64, 128, 8)], 128: [(_ANY, 32, 128, 8)]},
}


def shapes(kernel: str, qkv: Tensor, longest: int) -> dict[str, int]:
    """BLOCK_M queries, BLOCK_N keys (BLOCK of both for "short") and num_warps of a kernel."""
    rows = _HALF[kernel][qkv.shape[3]]
    queries, keys, warps = next(shape for limit, *shape in rows if longest <= limit)
    blocks = {"BLOCK": queries} if kernel == "short" else {"BLOCK_M": queries, "BLOCK_N": keys}
    return {**blocks, "num_warps": warps}
