"""Dropout as a function: whether an element is kept is a function of (seed, operation, the token's RNG coordinates).

A mask element is one byte of Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
It is kept if byte >= t8 = round(256 p) and then scaled by 256 / (256 - t8), so that the expectation is exact. The RNG
coordinates of a token are the id of its sequence, which is unique in a run, and its position in the sequence. So masks
do not depend on packing, padding, accumulation, rank or implementation, and the backward pass recomputes them.

The key is the 64-bit seed. Counters (c0, c1, c2, c3) with n = sequence id and word = operation << 8 (| head):

- hidden activations: (column // 16, position, n, word), byte column % 16;
- attention: a call covers groups of 4 x 4 pairs of query i and key j, chosen to match the registers of a tensor core,
  transposed or not: (key group, query group, n, word) with group(x) = (x >> 4) * 4 + ((x >> 1) & 3),
  32-bit word 2 * ((i >> 3) & 1) + ((j >> 3) & 1), and in that word byte 2 * (i & 1) + (j & 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bertfast.runtime.torch_compat import is_transformed

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_CHUNK = 1 << 17  # counters that are processed at a time: enough for several cores, few enough for their caches

# The operations with dropout; an operation's id follows from this order.
_SITES = ("attention", "attention_output", "output")
_OUTSIDE = ("embeddings", "classifier")
_SECOND_OF_HEAD = 2**24 - 1  # the last id: those of layers follow the ones above
_INTERMEDIATE = _SECOND_OF_HEAD - 1  # of layer 0; those of later layers count down


def operation_id(site: str, layer: int | None = None) -> int:
    """Return the id of the operation at `site`.

    Args:
        site: "embeddings", "classifier", "projection" (the second dropout of a head), or with a layer "intermediate"
            (before the last linear layer) or one of `_SITES`.
        layer: Index of the layer.
    """
    if site == "projection":
        return _SECOND_OF_HEAD
    if site == "intermediate" and layer is not None:
        return _INTERMEDIATE - layer
    if layer is None:
        return _OUTSIDE.index(site)
    return len(_OUTSIDE) + len(_SITES) * layer + _SITES.index(site)


@dataclass(frozen=True, eq=False)
class Dropout:
    """The dropout of one operation over a set of tokens.

    Attributes:
        p: Probability of dropping an element, in [0, 1).
        seed: int64 [] on the tokens' device, used as 64 bits.
        operation: See `operation_id`.
        sequence_ids: int64 [T], id of each token's sequence, unique in the run.
        positions: int64 [T], each token's position in its sequence.
    """

    p: float
    seed: Tensor
    operation: int
    sequence_ids: Tensor
    positions: Tensor

    def __post_init__(self) -> None:
        if not 0 <= self.p < 1:
            raise ValueError(f"the dropout probability must be in [0, 1), got {self.p}")

    @property
    def threshold(self) -> int:
        """t8: bytes below it are dropped; 0 for p = 0, else within 1 … 255."""
        return min(max(round(256 * self.p), 1), 255) if self.p else 0

    @property
    def scale(self) -> float:
        """The factor of kept elements."""
        return 256 / (256 - self.threshold)

    @property
    def counter_word(self) -> int:
        """The last word of the counter; attention adds the head."""
        return self.operation << 8


def draw_seed(device: torch.device) -> Tensor:
    """Draw a seed, int64 [], from torch's generator, whose state activation checkpointing restores."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)


def as_dropout(
    operation: str, dropout: Dropout | float | None, coordinates: Callable[[], tuple[Tensor, Tensor]], x: Tensor
) -> Dropout | None:
    """Return an operator's `dropout` argument as a `Dropout`; a probability gets a new seed.

    Args:
        operation: Name of the operator, for the message.
        dropout: The argument.
        coordinates: Called for a probability: returns (sequence ids, positions), int64 [T] each.
        x: The seed is drawn on its device.

    Raises:
        TypeError: `dropout` is neither a probability, a `Dropout` nor None.
        ValueError: The probability is not in [0, 1).
    """
    if dropout is None or isinstance(dropout, Dropout):
        return dropout
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)):
        raise TypeError(
            f"{operation}: dropout must be a probability, a bertfast.ops.dropout.Dropout or None, got "
            f"{type(dropout).__name__}"
        )
    return Dropout(dropout, draw_seed(x.device), 0, *coordinates()) if dropout else None


def row_coordinates(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (sequence ids, positions), int64 [T] each, of rows [T, …] that are one sequence."""
    positions = torch.arange(x.shape[0], device=x.device)
    return torch.zeros_like(positions), positions


KernelArguments = tuple[Tensor | None, Tensor | None, Tensor | None, int, int]
"""Dropout as it is passed to the kernels: (seed, sequence ids, positions, counter word, threshold)."""


def kernel_arguments(dropout: Dropout | None) -> KernelArguments:
    """Return the arguments of a kernel on activations; without dropout, no tensors and zeros."""
    if dropout is None or dropout.p == 0:
        return None, None, None, 0, 0
    return dropout.seed, dropout.sequence_ids, dropout.positions, dropout.counter_word, dropout.threshold


def from_kernel_arguments(
    seed: Tensor | None, sequence_ids: Tensor | None, positions: Tensor | None, counter_word: int, threshold: int
) -> Dropout | None:
    """Return the dropout with these `kernel_arguments`."""
    if seed is None or sequence_ids is None or positions is None:
        return None
    return Dropout(threshold / 256, seed, counter_word >> 8, sequence_ids, positions)


@dataclass(frozen=True, eq=False)
class RngCoordinates:
    """The RNG coordinates of a batch's tokens, from which each operation of a model computes its dropout mask.

    Attributes:
        seed: See `Dropout`.
        sequence_ids: See `Dropout`.
        positions: See `Dropout`.
    """

    seed: Tensor
    sequence_ids: Tensor
    positions: Tensor

    def at(self, rows: Tensor) -> RngCoordinates:
        """Return the coordinates of the tokens at `rows` (int64 [R])."""
        return replace(self, sequence_ids=self.sequence_ids[rows], positions=self.positions[rows])

    def dropout(self, p: float, site: str, layer: int | None = None) -> Dropout | None:
        """Return the dropout of the operation at a site of the model (see `operation_id`); None if p is 0."""
        if p == 0:
            return None
        return Dropout(p, self.seed, operation_id(site, layer), self.sequence_ids, self.positions)


@torch.no_grad()
def philox(counter: Sequence[Tensor | int], seed: Tensor) -> Tensor:
    """Compute Philox4x32-10.

    Args:
        counter: Four int64 tensors or ints below 2**32, which broadcast.
        seed: int64 [], the key.

    Returns:
        uint8 [..., 16], from the lowest byte of word 0 to the highest of word 3.
    """
    device = seed.device
    words: Sequence[Tensor] = torch.broadcast_tensors(
        *(torch.as_tensor(c, dtype=torch.int64, device=device) for c in counter)
    )
    shape = words[0].shape
    flat = [c.reshape(-1) for c in words]
    rounds = torch.arange(10, device=device)
    low, high = (((word & _WORD) + rounds * step) & _WORD for word, step in zip((seed, seed >> 32), _WEYL, strict=True))
    keys = list(zip(low.unbind(), high.unbind(), strict=True))
    if is_transformed():  # under vmap, a batched seed cannot be written in place into counters that are not batched
        flat = [c + (seed & 0) for c in flat]
    out = flat[0].new_empty(flat[0].numel(), 4, dtype=torch.int32)
    for start in range(0, len(out), _CHUNK):
        _philox_rounds([c[start : start + _CHUNK].clone() for c in flat], keys, out[start : start + _CHUNK])
    return out.view(torch.uint8).reshape(*shape, 16)


def _philox_rounds(c: list[Tensor], keys: list[tuple[Tensor, Tensor]], out: Tensor) -> None:
    # Factors are below 2**32, so their 64-bit multiplication is exact, signed or not, and bits 32 … 63 are the
    # high word after masking. c[1] and c[3] keep bits above 31, which the mask after the exclusive or clears.
    for key0, key1 in keys:
        a, b = c[0].mul_(_MULTIPLIERS[0]), c[2].mul_(_MULTIPLIERS[1])
        high_b = (b >> 32).bitwise_xor_(c[1]).bitwise_xor_(key0).bitwise_and_(_WORD)
        high_a = (a >> 32).bitwise_xor_(c[3]).bitwise_xor_(key1).bitwise_and_(_WORD)
        c = [high_b, b, high_a, a]
    for word, value in enumerate(c):
        out[:, word] = value  # the conversion to int32 keeps the low 32 bits


def hidden_keep(dropout: Dropout, columns: int) -> Tensor:
    """Return which elements of activations [T, columns] are kept, bool [T, columns]."""
    groups = torch.arange(-(-columns // 16), device=dropout.seed.device)
    counter = (groups, dropout.positions[:, None], dropout.sequence_ids[:, None], dropout.counter_word)
    return philox(counter, dropout.seed).flatten(1)[:, :columns] >= dropout.threshold


def attention_keep(dropout: Dropout, sequence_ids: Tensor | int, heads: int, keys: int, queries: range) -> Tensor:
    """Return which attention probabilities of one sequence, or of several of one length, are kept.

    Args:
        dropout: The operation's; its sequence ids and positions are not read.
        sequence_ids: int64 [] or [S].
        heads: Number of heads.
        keys: Number of keys, which start at position 0.
        queries: Positions of the queries.

    Returns:
        bool [heads, len(queries), keys], or [S, heads, len(queries), keys].
    """
    device = dropout.seed.device
    ids = torch.as_tensor(sequence_ids, device=device)
    first, last = queries.start // 16, -(-queries.stop // 16)
    rows, columns = last - first, -(-keys // 16)
    key_groups = torch.arange(4 * columns, device=device)
    query_groups = torch.arange(4 * first, 4 * last, device=device)[:, None]
    word = dropout.counter_word + torch.arange(heads, device=device)[:, None, None]
    octets = philox((key_groups, query_groups, ids[..., None, None, None], word), dropout.seed)
    # Rearrange the bytes of calls into rows of queries i and columns of keys j. The bytes of keys 2 b and 2 b + 1 stay
    # adjacent, as 16 bits. Dimensions of `pairs`:
    # [sequence and head, i >> 4, (i >> 1) & 3, j >> 4, (j >> 1) & 3, i >> 3 & 1, j >> 3 & 1, i & 1]
    pairs = octets.view(torch.int16).view(ids.numel() * heads, rows, 4, columns, 4, 2, 2, 2)
    tiles = pairs.permute(0, 1, 5, 2, 7, 3, 6, 4).reshape(*ids.shape, heads, 16 * rows, 8 * columns)
    start = queries.start - 16 * first
    return tiles.view(torch.uint8)[..., start : start + len(queries), :keys] >= dropout.threshold


def attention_keep_at(dropout: Dropout, sequence_ids: Tensor, heads: int, keys: int, positions: Tensor) -> Tensor:
    """Return which probabilities of one query per sequence are kept.

    Row s equals `attention_keep(dropout, sequence_ids[s], heads, keys, range(i, i + 1))` for i = positions[s].

    Args:
        dropout: The operation's; its sequence ids and positions are not read.
        sequence_ids: int64 [S].
        heads: Number of heads.
        keys: Number of keys, which start at position 0.
        positions: int64 [S], the query's position in each sequence.

    Returns:
        bool [S, heads, keys].
    """
    device = dropout.seed.device
    key, query = torch.arange(keys, device=device), positions[:, None, None]
    # Group and byte of query i and key j in the counter, as this module's docstring says.
    word = dropout.counter_word + torch.arange(heads, device=device)[:, None]
    key_groups = torch.arange(4 * -(-keys // 16), device=device)
    octets = philox((key_groups, _group(query), sequence_ids[:, None, None], word), dropout.seed)
    byte = 8 * ((query >> 3) & 1) + 4 * ((key >> 3) & 1) + 2 * (query & 1) + (key & 1)  # [S, 1, keys]
    octets = octets[:, :, _group(key)]  # [S, heads, keys, 16]
    index = byte[..., None].expand(*octets.shape[:-1], 1)
    return octets.gather(3, index).squeeze(3) >= dropout.threshold


def _group(position: Tensor) -> Tensor:
    return (position >> 4) * 4 + ((position >> 1) & 3)
