"""Tile shapes of the attention kernels: tables by head dimension and longest sequence, by chip and dtype.

Every entry compiles without a spill under Triton 3.6 and 3.7, with and without dropout, for the chips it is for
(`bench/results/compiled_kernels.md`). Which is the fastest a GPU has yet to say.
"""

from torch import Tensor

from bertfast.kernels import device

_ANY = 1 << 31

# kernel: {head dimension: [(longest sequence, queries, keys, warps), …]}, of which the first that is long enough.
_HOPPER = {
    "forward": {
        32: [(32, 32, 32, 4), (128, 64, 64, 4), (_ANY, 128, 64, 8)],
        64: [(32, 32, 32, 4), (128, 64, 64, 4), (_ANY, 128, 64, 8)],
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
_OTHER = {
    "forward": {
        32: [(32, 32, 32, 4), (_ANY, 64, 64, 4)],
        64: [(32, 32, 32, 4), (_ANY, 64, 64, 8)],
        128: [(32, 32, 32, 2), (_ANY, 128, 64, 8)],
    },
    "short": {
        32: [(32, 32, 32, 2), (_ANY, 64, 64, 4)],
        64: [(32, 32, 32, 2), (_ANY, 64, 64, 4)],
        128: [(32, 32, 32, 2), (_ANY, 64, 64, 8)],
    },
    "d_q": {32: [(_ANY, 128, 64, 8)], 64: [(_ANY, 128, 64, 8)], 128: [(_ANY, 128, 32, 8)]},
    "d_kv": {32: [(_ANY, 32, 128, 8)], 64: [(_ANY, 32, 128, 8)], 128: [(_ANY, 32, 64, 8)]},
}
# By the major number of the capability; the newer two differ where Triton 3.6 would spill.
_BLACKWELL = _OTHER | {"forward": _OTHER["forward"] | {64: [(32, 32, 32, 4), (_ANY, 64, 64, 4)]}}
_BLACKWELL_CONSUMER = _OTHER | {"d_kv": _OTHER["d_kv"] | {64: [(_ANY, 16, 128, 8)]}}
_BY_MAJOR = {9: _HOPPER, 10: _BLACKWELL, 12: _BLACKWELL_CONSUMER}
# fp32 on any chip: products of three TF32 parts want three times the registers.
_SINGLE = {
    "forward": {32: [(_ANY, 64, 32, 4)], 64: [(_ANY, 32, 32, 8)], 128: [(_ANY, 16, 32, 8)]},
    "short": {32: [(_ANY, 32, 32, 8)], 64: [(_ANY, 32, 32, 8)], 128: [(_ANY, 16, 16, 8)]},
    "d_q": {32: [(_ANY, 32, 16, 4)], 64: [(_ANY, 32, 32, 8)], 128: [(_ANY, 16, 16, 8)]},
    "d_kv": {32: [(_ANY, 16, 32, 4)], 64: [(_ANY, 32, 16, 4)], 128: [(_ANY, 16, 16, 8)]},
}


def shapes(kernel: str, qkv: Tensor, longest: int) -> dict[str, int]:
    """BLOCK_M queries and BLOCK_N keys of a tile, BLOCK of both for "short", and num_warps."""
    if qkv.element_size() == 4:
        table = _SINGLE
    else:
        table = _BY_MAJOR.get(device.capability(qkv.device)[0], _OTHER)
    queries, keys, warps = next(shape for limit, *shape in table[kernel][qkv.shape[3]] if longest <= limit)
    blocks = {"BLOCK": queries} if kernel == "short" else {"BLOCK_M": queries, "BLOCK_N": keys}
    return {**blocks, "num_warps": warps}
