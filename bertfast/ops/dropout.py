"""Dropout as a function: whether an element is kept follows from (seed, operation, the token's own identity).

A mask element is one byte of Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
It is kept where byte >= t8 = round(256 p) and scaled by 256 / (256 - t8), so the expectation is exact. A token's
identity is the number of its sequence in the run and its position there: masks do not depend on packing, padding,
accumulation, rank or implementation, and the backward pass can compute them again instead of storing them.

Counters (c0, c1, c2, c3), key = the 64-bit seed, n = sequence number, word = operation << 8 (| head):

- hidden activations: (column // 16, position, n, word), byte column % 16;
- attention: query i and key j share a call in groups of 4 x 4 that fit a matrix unit's registers, transposed or not:
  (key group, query group, n, word) with group(x) = (x >> 4) * 4 + ((x >> 1) & 3),
  32-bit word 2 * ((i >> 3) & 1) + ((j >> 3) & 1), byte 2 * (i & 1) + (j & 1) of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bertfast.runtime.torch_compat import is_transformed

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_CHUNK = 1 << 17  # counters worked on at a time: enough for several cores, few enough for their cache

# The operations that drop, in the order that numbers them within a layer.
_SITES = ("attention", "attention_output", "output")
_OUTSIDE = ("embeddings", "classifier")


def operation_number(site: str, layer: int | None = None) -> int:
    """Number of the operation at `site`: "embeddings", "classifier", or with a layer one of that layer's three."""
    if layer is None:
        return _OUTSIDE.index(site)
    return len(_OUTSIDE) + len(_SITES) * layer + _SITES.index(site)


@dataclass(frozen=True, eq=False)
class Dropout:
    """One operation's dropout over a set of tokens.

    Attributes:
        p: probability of dropping, in [0, 1).
        seed: int64 [] on the tokens' device, taken as 64 bits.
        operation: see `operation_number`.
        sequence_number: int64 [T], number in the run of each token's sequence.
        position: int64 [T], each token's position in its sequence.
    """

    p: float
    seed: Tensor
    operation: int
    sequence_number: Tensor
    position: Tensor

    def __post_init__(self):
        if not 0 <= self.p < 1:
            raise ValueError(f"the dropout probability must be in [0, 1), got {self.p}")

    @property
    def threshold(self) -> int:
        """t8: bytes below it are dropped; 0 for p = 0, else within 1 … 255."""
        return min(max(round(256 * self.p), 1), 255) if self.p else 0

    @property
    def scale(self) -> float:
        """What kept elements are multiplied by."""
        return 256 / (256 - self.threshold)

    @property
    def word(self) -> int:
        """The last word of the counter, before a head is added."""
        return self.operation << 8


def draw_seed(device: torch.device) -> Tensor:
    """Draw a seed for dropout from torch's generator: int64 [], replayed with it by activation checkpointing."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)


def as_dropout(
    operation: str, dropout: Dropout | float | None, coordinates: Callable[[], tuple[Tensor, Tensor]], x: Tensor
) -> Dropout | None:
    """Return what an operator was given as `dropout`; of a probability, dropout with a seed of its own.

    Args:
        operation: Name of the operator, for the message.
        coordinates: Called for a probability: the tokens' (sequence ids, positions), int64 [T] each.
        x: On whose device the seed is drawn, from torch's generator there.

    Raises:
        TypeError: It is neither; ValueError: a probability is outside of [0, 1).
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
    """Return the RNG coordinates (sequence ids, positions) of rows [T, …] that are one sequence, int64 [T] each."""
    positions = torch.arange(x.shape[0], device=x.device)
    return torch.zeros_like(positions), positions


def from_kernel_arguments(
    seed: Tensor | None, sequence_number: Tensor | None, position: Tensor | None, word: int, threshold: int
) -> Dropout | None:
    """Return the dropout of which `kernel_arguments` are these."""
    if seed is None:
        return None
    return Dropout(threshold / 256, seed, word >> 8, sequence_number, position)


def kernel_arguments(dropout: Dropout | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, int, int]:
    """What a kernel on activations is told: (seed, sequence_number, position, word, threshold), or nothing to drop."""
    if dropout is None or dropout.p == 0:
        return None, None, None, 0, 0
    return dropout.seed, dropout.sequence_number, dropout.position, dropout.word, dropout.threshold


@dataclass(frozen=True, eq=False)
class RngCoordinates:
    """RNG coordinates of a batch's tokens, from which each operation of a model computes its dropout mask.

    Attributes: see `Dropout`.
    """

    seed: Tensor
    sequence_number: Tensor
    position: Tensor

    def at(self, rows: Tensor) -> RngCoordinates:
        """Return the coordinates of the tokens at `rows` (int64 [R])."""
        return replace(self, sequence_number=self.sequence_number[rows], position=self.position[rows])

    def dropout(self, p: float, site: str, layer: int | None = None) -> Dropout | None:
        """Dropout at one site of the model; None where nothing is dropped."""
        if p == 0:
            return None
        return Dropout(p, self.seed, operation_number(site, layer), self.sequence_number, self.position)


@torch.no_grad()
def philox(counter: tuple, seed: Tensor) -> Tensor:
    """Philox4x32-10 of a counter of four broadcastable int64 tensors or ints below 2**32 -> uint8 [..., 16].

    Bytes run from the lowest of word 0 to the highest of word 3.
    """
    device = seed.device
    counter = torch.broadcast_tensors(*(torch.as_tensor(c, dtype=torch.int64, device=device) for c in counter))
    shape = counter[0].shape
    flat = [c.reshape(-1) for c in counter]
    rounds = torch.arange(10, device=device)
    low, high = (((word & _WORD) + rounds * step) & _WORD for word, step in zip((seed, seed >> 32), _WEYL, strict=True))
    keys = list(zip(low.unbind(), high.unbind(), strict=True))
    if is_transformed():  # a seed that vmap batches cannot be written into counters that it does not
        flat = [c + (seed & 0) for c in flat]
    out = flat[0].new_empty(flat[0].numel(), 4, dtype=torch.int32)
    for start in range(0, len(out), _CHUNK):
        _philox_rounds([c[start : start + _CHUNK].clone() for c in flat], keys, out[start : start + _CHUNK])
    return out.view(torch.uint8).reshape(*shape, 16)


def _philox_rounds(c: list[Tensor], keys: list[tuple[Tensor, Tensor]], out: Tensor) -> None:
    # Multiplicands are below 2**32, so 64-bit products are exact; signed or not, bits 32..63 are the high word once
    # masked. c[1] and c[3] keep garbage above bit 31, which the mask after the exclusive or clears.
    for key0, key1 in keys:
        a, b = c[0].mul_(_MULTIPLIERS[0]), c[2].mul_(_MULTIPLIERS[1])
        high_b = (b >> 32).bitwise_xor_(c[1]).bitwise_xor_(key0).bitwise_and_(_WORD)
        high_a = (a >> 32).bitwise_xor_(c[3]).bitwise_xor_(key1).bitwise_and_(_WORD)
        c = [high_b, b, high_a, a]
    for word, value in enumerate(c):
        out[:, word] = value  # the conversion to int32 keeps the low 32 bits


def hidden_keep(dropout: Dropout, columns: int) -> Tensor:
    """Which elements of activations [T, columns] are kept: bool of that shape."""
    groups = torch.arange(-(-columns // 16), device=dropout.seed.device)
    counter = (groups, dropout.position[:, None], dropout.sequence_number[:, None], dropout.word)
    return philox(counter, dropout.seed).flatten(1)[:, :columns] >= dropout.threshold


def attention_keep(dropout: Dropout, number, heads: int, keys: int, queries: range) -> Tensor:
    """Which probabilities of a sequence are kept: bool [heads, len(queries), keys].

    `number` is the sequence's (int or int64 []); `queries` the positions that ask. Sequences of one length can be asked
    for at once: numbers int64 [S] give bool [S, heads, len(queries), keys].
    """
    device = dropout.seed.device
    number = torch.as_tensor(number, device=device)
    first, last = queries.start // 16, -(-queries.stop // 16)
    rows, columns = last - first, -(-keys // 16)
    key_groups = torch.arange(4 * columns, device=device)
    query_groups = torch.arange(4 * first, 4 * last, device=device)[:, None]
    word = dropout.word + torch.arange(heads, device=device)[:, None, None]
    octets = philox((key_groups, query_groups, number[..., None, None, None], word), dropout.seed)
    # The bytes of keys 2 b and 2 b + 1 stay together, as 16 bits, on their way to rows of i and columns of j:
    # [sequence and head, i >> 4, (i >> 1) & 3, j >> 4, (j >> 1) & 3, i >> 3 & 1, j >> 3 & 1, i & 1]
    pairs = octets.view(torch.int16).view(number.numel() * heads, rows, 4, columns, 4, 2, 2, 2)
    tiles = pairs.permute(0, 1, 5, 2, 7, 3, 6, 4).reshape(*number.shape, heads, 16 * rows, 8 * columns)
    start = queries.start - 16 * first
    return tiles.view(torch.uint8)[..., start : start + len(queries), :keys] >= dropout.threshold


def attention_keep_at(dropout: Dropout, sequence_ids: Tensor, heads: int, keys: int, positions: Tensor) -> Tensor:
    """Return which probabilities of one query per sequence are kept: bool [S, heads, keys].

    Row s equals `attention_keep(dropout, sequence_ids[s], heads, keys, range(i, i + 1))` for i = positions[s].

    Args:
        sequence_ids: int64 [S].
        positions: int64 [S], the query's position in each sequence.
    """
    device = dropout.seed.device
    key, query = torch.arange(keys, device=device), positions[:, None, None]
    # Group and byte of query i and key j in the counter, as this module's docstring says.
    word = dropout.word + torch.arange(heads, device=device)[:, None]
    key_groups = torch.arange(4 * -(-keys // 16), device=device)
    octets = philox((key_groups, _group(query), sequence_ids[:, None, None], word), dropout.seed)
    byte = 8 * ((query >> 3) & 1) + 4 * ((key >> 3) & 1) + 2 * (query & 1) + (key & 1)  # [S, 1, keys]
    octets = octets[:, :, _group(key)]  # [S, heads, keys, 16]
    index = byte[..., None].expand(*octets.shape[:-1], 1)
    return octets.gather(3, index).squeeze(3) >= dropout.threshold


def _group(position: Tensor) -> Tensor:
    return (position >> 4) * 4 + ((position >> 1) & 3)
