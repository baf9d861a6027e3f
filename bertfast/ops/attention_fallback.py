"""Attention in plain PyTorch where no kernel supports it: the reference, in less memory and time.

On a CPU, where the host can read lengths, each sequence is computed at its own length. On other devices the host never
waits: the reference runs on a few sequences at a time, padded to `max_seqlen_bound`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from bertfast.ops import reference, reference_parts
from bertfast.ops.dropout import Dropout, attention_keep
from bertfast.ops.sequences import Sequences

_MASK_ELEMENTS = 1 << 24  # elements of dropout masks that are drawn at a time
_SCORE_ELEMENTS = 1 << 26  # elements of scores that are computed at a time


def attention(
    qkv: Tensor, sequences: Sequences, scale: float, causal: bool, window: int | None, dropout: Dropout | None
) -> Tensor:
    """Compute `reference.attention`: qkv [T, 3, A, D] -> [T, A, D], zero at padding slots."""
    compute = _by_length if sequences.on_host else _in_chunks
    return compute(qkv, sequences, scale, causal, window, dropout)


def _by_length(
    qkv: Tensor, sequences: Sequences, scale: float, causal: bool, window: int | None, dropout: Dropout | None
) -> Tensor:
    # One split for all sequences: its gradient is one concatenation, while each slice would fill a whole d_qkv.
    *parts, padding = torch.split(qkv, [*sequences.lengths, sequences.capacity - sequences.num_tokens])
    keeps: Sequence[Tensor | None] = [None] * len(parts)
    if dropout is not None:
        keeps = _keeps(dropout, parts, sequences.sequence_ids)
    outputs = []
    for part, keep in zip(parts, keeps, strict=True):
        if len(part):
            query, key, value = part.permute(1, 2, 0, 3)
            masked = reference_parts.not_attended(len(part), causal, window, part.device)
            probabilities = reference_parts.masked_softmax(query, key, scale, masked, keep, dropout)
            outputs.append((probabilities.to(value.dtype) @ value).transpose(0, 1))
    # The zeros are computed from qkv, so that the padding slots have a gradient, of zero.
    zeros = padding[:, 0].masked_fill(torch.ones_like(padding[:, 0], dtype=torch.bool), 0)
    return torch.cat([*outputs, zeros])


def _keeps(dropout: Dropout, parts: list[Tensor], sequence_ids: Tensor) -> list[Tensor | None]:
    """Return each sequence's mask, bool [A, N, N]; `parts` are its tokens [N, 3, A, D].

    Sequences with equal numbers of 16 x 16 tiles are drawn together: for short ones the calls cost more than the masks.
    """
    keeps: list[Tensor | None] = [None] * len(parts)
    by_tiles = defaultdict(list)
    for index, part in enumerate(parts):
        if len(part):
            by_tiles[-(-len(part) // 16)].append(index)
    for tiles, members in by_tiles.items():
        heads = parts[members[0]].shape[2]
        at_once = max(_MASK_ELEMENTS // (heads * (16 * tiles) ** 2), 1)
        for start in range(0, len(members), at_once):
            chunk = members[start : start + at_once]
            drawn = attention_keep(dropout, sequence_ids[chunk], heads, 16 * tiles, range(16 * tiles))
            for index, keep in zip(chunk, drawn, strict=True):
                keeps[index] = keep[:, : len(parts[index]), : len(parts[index])]
    return keeps


def _in_chunks(
    qkv: Tensor, sequences: Sequences, scale: float, causal: bool, window: int | None, dropout: Dropout | None
) -> Tensor:
    bound = sequences.max_seqlen_bound
    at_once = max(_SCORE_ELEMENTS // max(qkv.shape[2] * bound**2, 1), 1)
    if len(sequences) <= at_once:
        return reference.attention(qkv, sequences, scale, causal, window, dropout)
    rows = []
    for start in range(0, len(sequences), at_once):
        # Slots before the first of these belong to no sequence of the chunk.
        cu_seqlens = sequences.cu_seqlens[start : start + at_once + 1]
        chunk = Sequences(cu_seqlens, sequences.sequence_ids[start : start + at_once], sequences.capacity, bound)
        probabilities, value = reference.attention_probabilities(qkv, chunk, scale, causal, window, dropout)
        rows.append((probabilities.to(value.dtype) @ value).transpose(1, 2))
    return reference_parts.to_slots(torch.cat(rows), sequences)
