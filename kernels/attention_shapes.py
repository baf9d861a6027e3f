"""Block shapes of the attention kernels: tables by head dimension and bound on the length, by GPU, dtype and dropout.

Entries are chosen so that no register spills and no wgmma is serialised under Triton 3.6, 3.7 and 3.8 on their GPUs,
which `bench.sass_model.compiled_kernels` checks. One is known to spill: "short" in fp32 with dropout at D = 128 under
Triton 3.8, with 4, 8 or 16 warps. The entries have not been tuned on a GPU.
"""

from functools import cache

from torch import Tensor

from bertfast.kernels import device
from bertfast.kernels.jit import TRITON_VERSION

_ANY = 1 << 31

# kernel: {head dimension: [(bound on the length, queries, keys, warps[, maxnreg]), …]}; the first entry with a
# bound of at least max_seqlen_bound is used.
_Table = dict[str, dict[int, list[tuple[int, ...]]]]
_HOPPER: _Table = {
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
# A dropout mask takes registers. maxnreg is set so that an SM holds twice as many warps; see bench/LOG.md.
_HOPPER_DROPOUT: _Table = _HOPPER | {
    "forward": _HOPPER["forward"] | {64: [(32, 32, 32, 4), (128, 64, 64, 4, 128), (_ANY, 128, 64, 8, 128)]},
    "d_q": _HOPPER["d_q"] | {32: [(_ANY, 64, 64, 4)], 64: [(_ANY, 64, 64, 4)]},
}
if TRITON_VERSION >= (3, 8):  # 64 x 128 spills two registers there
    _HOPPER_DROPOUT["d_kv"] = _HOPPER["d_kv"] | {64: [(_ANY, 32, 128, 8)]}
_OTHER: _Table = {
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
# By the major compute capability; Blackwell differs where Triton 3.6 would spill.
_BLACKWELL: _Table = _OTHER | {"forward": _OTHER["forward"] | {64: [(32, 32, 32, 4), (_ANY, 64, 64, 4)]}}
_BLACKWELL_CONSUMER: _Table = _OTHER | {"d_kv": _OTHER["d_kv"] | {64: [(_ANY, 16, 128, 8)]}}
_BY_MAJOR = {10: _BLACKWELL, 12: _BLACKWELL_CONSUMER}
# fp32 on any GPU architecture: GEMMs of three TF32 parts require three times the registers.
_SINGLE: _Table = {
    "forward": {32: [(_ANY, 64, 32, 4)], 64: [(_ANY, 32, 32, 8)], 128: [(_ANY, 16, 32, 8)]},
    "short": {32: [(_ANY, 32, 32, 8)], 64: [(_ANY, 32, 32, 8)], 128: [(_ANY, 16, 16, 8)]},
    "d_q": {32: [(_ANY, 32, 16, 4)], 64: [(_ANY, 32, 32, 8)], 128: [(_ANY, 16, 16, 8)]},
    "d_kv": {32: [(_ANY, 16, 32, 4)], 64: [(_ANY, 32, 16, 4)], 128: [(_ANY, 16, 16, 8)]},
}


def shapes(kernel: str, qkv: Tensor, max_seqlen_bound: int, dropout: bool) -> dict[str, int]:
    """Return the launch options of a kernel: BLOCK_M queries and BLOCK_N keys, or BLOCK of both for "short", and warps.

    Kernels that loop over keys also have SPLIT: whether full blocks of keys have a loop body of their own, without a
    mask. It takes registers, too many for fp32, and for D = 128 if both operands of a matmul are in registers.

    Args:
        kernel: "forward", "short", "d_q" or "d_kv".
        qkv: [T, 3, A, D], of which the device, dtype and D matter.
        max_seqlen_bound: No sequence is longer.
        dropout: Whether the kernel draws a dropout mask.
    """
    major = device.capability(qkv.device)[0]
    return _shapes(kernel, major, qkv.element_size(), qkv.shape[3], max_seqlen_bound, dropout)


@cache
def _shapes(
    kernel: str, major: int, element_size: int, head_dimension: int, max_seqlen_bound: int, dropout: bool
) -> dict[str, int]:
    if element_size == 4:
        table = _SINGLE
    elif major == 9:
        table = _HOPPER_DROPOUT if dropout else _HOPPER
    else:
        table = _BY_MAJOR.get(major, _OTHER)
    shape = next(shape for bound, *shape in table[kernel][head_dimension] if max_seqlen_bound <= bound)
    queries, keys, warps, *registers = shape
    blocks = {"BLOCK": queries} if kernel == "short" else {"BLOCK_M": queries, "BLOCK_N": keys}
    if kernel in ("forward", "d_q"):
        blocks["SPLIT"] = element_size < 4 and (major == 9 or head_dimension < 128)
    return {**blocks, "num_warps": warps, **({"maxnreg": registers[0]} if registers else {})}
