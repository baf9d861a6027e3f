"""Parts of the reference (`bertfast.ops.reference`) that several operations share: masks, softmax, norms and dropout.

Shapes are named as there.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from bertfast.ops.dropout import Dropout, hidden_keep
from bertfast.ops.sequences import Sequences
from bertfast.runtime.torch_compat import autocast_dtype


def to_rows(x: Tensor, sequences: Sequences) -> Tensor:
    """Gather packed values into one row per sequence.

    Args:
        x: [T, …].
        sequences: Which slots belong to which sequence.

    Returns:
        [S, max_seqlen_bound, …], zero after a sequence's last token.
    """
    position = torch.arange(sequences.max_seqlen_bound, device=x.device)
    index = sequences.cu_seqlens[:-1, None] + position
    # Absent positions read a row of zeros after the last slot, since other slots may hold NaN.
    index = torch.where(position < sequences.cu_seqlens.diff()[:, None], index, len(x))
    padded: Tensor = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
    return padded[index]


def to_slots(rows: Tensor, sequences: Sequences) -> Tensor:
    """Scatter one row per sequence to packed slots, the inverse of `to_rows`.

    Args:
        rows: [S, max_seqlen_bound, …].
        sequences: Which slots belong to which sequence.

    Returns:
        [T, …], zero at padding slots.
    """
    count, bound, *shape = rows.shape
    index = sequences.sequence_index * bound + sequences.position
    index = torch.where(sequences.is_token, index, count * bound)
    return torch.cat([rows.flatten(0, 1), rows.new_zeros(1, *shape)])[index]


def not_attended(length: int, causal: bool, window: int | None, device: torch.device) -> Tensor | None:
    """Return which keys a query of the same sequence does not attend to. It always attends to its own position.

    Args:
        length: Number of positions, L.
        causal: Whether position i attends only to positions j <= i.
        window: Position i attends only to positions with |i - j| <= window; None: no limit.
        device: Device of the result.

    Returns:
        bool [L, L], queries in rows and keys in columns; None: all are attended to.
    """
    if not causal and window is None:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    masked = distance < 0 if causal else torch.zeros_like(distance, dtype=torch.bool)
    return masked if window is None else masked | (distance.abs() > window)


def masked_softmax(
    query: Tensor, key: Tensor, scale: float, masked: Tensor | None, keep: Tensor | None, dropout: Dropout | None
) -> Tensor:
    """Return dropout(softmax(Q K^T · scale)), at least in fp32.

    Args:
        query: [..., Q, D].
        key: [..., K, D].
        scale: Factor of the scores.
        masked: bool, broadcasts to [..., Q, K]: scores that are excluded; None: none are.
        keep: bool, broadcasts to [..., Q, K]: probabilities that dropout keeps; None: no dropout.
        dropout: Its scale applies to kept probabilities.

    Returns:
        [..., Q, K].
    """
    # The GEMM applies the scale before it rounds its result.
    flat = torch.baddbmm(query.new_zeros(1), query.flatten(0, -3), key.flatten(0, -3).mT, beta=0, alpha=scale)
    scores = accumulating(torch.unflatten(flat, 0, query.shape[:-2]))
    if masked is not None:
        scores = scores.masked_fill(masked, -math.inf)
    probabilities = scores.softmax(-1)
    if keep is None or dropout is None:
        return probabilities
    return probabilities * _factors(keep, dropout, probabilities.dtype)


def add_residual(x: Tensor, residual: Tensor, bias: Tensor | None, dropout: Dropout | None) -> Tensor:
    """Return residual + dropout(x + bias), at least fp32: x and residual [T, H], bias [H]."""
    x = accumulating(x)
    return drop_hidden(x if bias is None else x + bias, dropout) + residual


def layer_norm(x: Tensor, gamma: Tensor, beta: Tensor | None, eps: float) -> Tensor:
    """Return (x - mean) / sqrt(var + eps) · gamma + beta over the last dimension (Ba et al., 2016).

    Args:
        x: […, H].
        gamma: [H], weight.
        beta: [H], bias; None: no bias.
        eps: ε, added to the variance.

    Returns:
        […, H], at least fp32.
    """
    x = accumulating(x)
    beta = None if beta is None else beta.to(x.dtype)
    with nullcontext() if autocast_dtype(x.device) is None else torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x, gamma.shape, gamma.to(x.dtype), beta, eps)


def rms_norm(x: Tensor, gamma: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x²) + eps) · gamma over the last dimension (Zhang and Sennrich, 2019).

    Args:
        x: […, H].
        gamma: [H], weight.
        eps: ε, added to the mean of the squares.

    Returns:
        […, H], at least fp32.
    """
    x = accumulating(x)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gamma.to(x.dtype)


def drop_hidden(x: Tensor, dropout: Dropout | None) -> Tensor:
    """Return dropout(x) of activations.

    Args:
        x: [T, H].
        dropout: Probability and RNG coordinates of the T slots; None: x is returned.

    Returns:
        [T, H] in x's dtype.
    """
    if dropout is None:
        return x
    return x * _factors(hidden_keep(dropout, x.shape[1]), dropout, x.dtype)


def _factors(keep: Tensor, dropout: Dropout, dtype: torch.dtype) -> Tensor:
    # One factor per element, 0 or the scale: one multiplication forward and one backward, in one dtype, is fast.
    return keep.to(dtype).mul_(dropout.scale)


def accumulating(x: Tensor) -> Tensor:
    """Return x in the dtype of sums: half precisions become fp32; float64 stays, for checks of the definitions."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
