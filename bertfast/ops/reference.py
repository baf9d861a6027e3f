"""The operations of BERT in plain PyTorch: the specification, the oracle of the tests, and a fallback on any device.

Autograd differentiates each function, so that no gradient is written by hand, and all can be checked in float64.
Statistics, softmax and sums are at least fp32. Activations are packed: T token slots, S sequences, H hidden size,
A heads, D head dimension, R gathered rows, V vocabulary size.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from bertfast.ops.dropout import Dropout, attention_keep, attention_keep_at, hidden_keep
from bertfast.ops.sequences import Sequences
from bertfast.runtime.torch_compat import autocast_dtype

IGNORE_INDEX = -100
"""The label of rows that the loss ignores, as in PyTorch."""


def embeddings(
    token_ids: Tensor | None,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    dropout: Dropout | None,
    padding_index: int | None,
) -> Tensor:
    """Return dropout(LN(word[token] + token_type[type] + position[position])), [T, H]; see `ops.embeddings`."""
    tokens = word if token_ids is None else F.embedding(token_ids, word, padding_idx=padding_index)
    total = tokens + F.embedding(token_type_ids, token_type) + F.embedding(position_ids, position)
    return drop_hidden(layer_norm(total, gamma, beta, eps).to(tokens.dtype), dropout)


def attention(
    qkv: Tensor, sequences: Sequences, scale: float, causal: bool, window: int | None, dropout: Dropout | None
) -> Tensor:
    """Return dropout(softmax(Q K^T · scale)) V of each sequence, [T, A, D], zero at padding slots; see `ops.attention`.

    It takes memory in proportion to S · max_seqlen_bound²; `bertfast.ops.attention_fallback` takes less.
    """
    probabilities, value = attention_probabilities(qkv, sequences, scale, causal, window, dropout)
    context = (probabilities.to(value.dtype) @ value).transpose(1, 2)
    return to_slots(context, sequences)


def attention_probabilities(
    qkv: Tensor, sequences: Sequences, scale: float, causal: bool, window: int | None, dropout: Dropout | None
) -> tuple[Tensor, Tensor]:
    """Compute the attention probabilities after dropout.

    Position i attends to position j if j <= i or not `causal`, and if |i - j| <= window or that is None.

    Returns:
        Probabilities [S, A, N, N] and values [S, A, N, D], where N is max_seqlen_bound. At positions from a sequence's
        length on, rows of probabilities are finite and meaningless, columns are zero.
    """
    query, key, value = to_rows(qkv, sequences).permute(2, 0, 3, 1, 4)
    bound = sequences.max_seqlen_bound
    present = torch.arange(bound, device=qkv.device) < sequences.cu_seqlens.diff()[:, None]  # [S, N]
    masked = ~present[:, None, :]
    outside = not_attended(bound, causal, window, qkv.device)
    masked = masked if outside is None else masked | outside
    # Absent queries attend to all keys: the softmax of an empty set would be NaN, and so would its gradient.
    masked = (masked & present[:, :, None])[:, None]
    heads = qkv.shape[2]
    keep = None if dropout is None else attention_keep(dropout, sequences.sequence_ids, heads, bound, range(bound))
    return masked_softmax(query, key, scale, masked, keep, dropout), value


def query_only_attention(
    query: Tensor,
    qkv: Tensor,
    sequences: Sequences,
    scale: float,
    causal: bool,
    window: int | None,
    dropout: Dropout | None,
) -> Tensor:
    """Compute attention of one query-only token per sequence: it is a query but not a key.

    The token precedes its sequence. If `causal`, it attends to no key, and the result is zero, as for an empty
    sequence. Its position for dropout is the one after the last token.

    Args:
        query: [S, A, D].
        qkv: [T, 3, A, D], of which only keys and values are read.
        sequences: Which slots belong to which sequence.
        scale: Of the scores.
        causal: See above.
        window: The token attends only to positions up to this one; None: no limit.
        dropout: Of the probabilities.

    Returns:
        [S, A, D].
    """
    if causal:
        return torch.zeros_like(query)
    key, value = to_rows(qkv[:, 1:], sequences).permute(2, 0, 3, 1, 4)
    bound, lengths = sequences.max_seqlen_bound, sequences.cu_seqlens.diff()[:, None]
    position = torch.arange(bound, device=qkv.device)
    masked = position >= lengths
    masked = masked if window is None else masked | (position > window)
    masked = masked & (lengths > 0)  # an empty sequence attends to all keys; its values are zero
    keep = None
    if dropout is not None:
        keep = attention_keep_at(dropout, sequences.sequence_ids, query.shape[1], bound, lengths[:, 0].long())
        keep = keep[:, :, None]
    probabilities = masked_softmax(query[:, :, None], key, scale, masked[:, None, None], keep, dropout)
    context: Tensor = probabilities.to(value.dtype) @ value
    return context.squeeze(2)


def to_rows(x: Tensor, sequences: Sequences) -> Tensor:
    """Gather packed values [T, …] into one row per sequence [S, max_seqlen_bound, …], zero after its last token."""
    position = torch.arange(sequences.max_seqlen_bound, device=x.device)
    index = sequences.cu_seqlens[:-1, None] + position
    # Absent positions read a row of zeros after the last slot, since other slots may hold NaN.
    index = torch.where(position < sequences.cu_seqlens.diff()[:, None], index, len(x))
    padded: Tensor = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
    return padded[index]


def to_slots(rows: Tensor, sequences: Sequences) -> Tensor:
    """Return rows [S, max_seqlen_bound, …] as packed slots [T, …], zero at padding slots."""
    count, bound, *shape = rows.shape
    index = sequences.sequence_index * bound + sequences.position
    index = torch.where(sequences.is_token, index, count * bound)
    return torch.cat([rows.flatten(0, 1), rows.new_zeros(1, *shape)])[index]


def not_attended(length: int, causal: bool, window: int | None, device: torch.device) -> Tensor | None:
    """Return which keys (columns) a query (row) of the same sequence does not attend to, bool [L, L]; None: all False.

    A query always attends to its own position.
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
        scale: Of the scores.
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


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    dropout: Dropout | None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return LN(residual + dropout(x + bias)), [T, H] in residual's dtype, and also in `compute_dtype` if given."""
    x = accumulating(x)
    x = drop_hidden(x if bias is None else x + bias, dropout)
    y = layer_norm(x + residual, gamma, beta, eps)
    return y.to(residual.dtype) if compute_dtype is None else (y.to(residual.dtype), y.to(compute_dtype))


def bias_gelu(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    """Return gelu(x + bias), [T, columns] in x's dtype."""
    return F.gelu(accumulating(x) + bias, approximate=approximate).to(x.dtype)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, approximate: str) -> Tensor:
    """Return gelu(x W^T + bias), [T, columns]."""
    return F.gelu(F.linear(x, weight, bias), approximate=approximate)


def gelu_layer_norm(x: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """Return LN(gelu(x + bias)) with the exact GELU, [R, H] in gamma's dtype."""
    return layer_norm(F.gelu(accumulating(x) + bias), gamma, beta, eps).to(gamma.dtype)


def linear_cross_entropy(
    hidden: Tensor, rows: Tensor | None, weight: Tensor, bias: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss [], correct int64 [], counted int64 []) of hidden[rows] W^T + bias; see `ops.linear_cross_entropy`.

    A label outside the vocabulary makes the loss NaN. All logits are materialised;
    `bertfast.ops.linear_cross_entropy_fallback` computes them in chunks.
    """
    counted = labels >= 0
    x = hidden if rows is None else hidden[rows]
    x = x.masked_fill(~counted[:, None], 0)  # ignored rows may hold any values, also NaN
    logits = accumulating(F.linear(x, weight, bias))
    target = labels.clamp(0, len(weight) - 1).long()[:, None]
    losses = (logits.logsumexp(1) - logits.gather(1, target).squeeze(1)) * counted
    loss = losses.masked_fill(labels >= len(weight), math.nan).sum()
    correct = ((logits.detach().argmax(1) == labels) & counted).sum()
    return loss, correct, counted.sum()


def layer_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """Return (x - mean) / sqrt(var + eps) · gamma + beta over the last dimension, at least fp32 (Ba et al., 2016)."""
    x = accumulating(x)
    with nullcontext() if autocast_dtype(x.device) is None else torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x, gamma.shape, gamma.to(x.dtype), beta.to(x.dtype), eps)


def drop_hidden(x: Tensor, dropout: Dropout | None) -> Tensor:
    """Return dropout(x) of activations [T, H]."""
    if dropout is None:
        return x
    return x * _factors(hidden_keep(dropout, x.shape[1]), dropout, x.dtype)


def _factors(keep: Tensor, dropout: Dropout, dtype: torch.dtype) -> Tensor:
    # One factor per element, 0 or the scale: one multiplication forward and one backward, in one dtype, is fast.
    return keep.to(dtype).mul_(dropout.scale)


def accumulating(x: Tensor) -> Tensor:
    """Return x in the dtype of sums: half precisions become fp32; float64 stays, for checks of the definitions."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
