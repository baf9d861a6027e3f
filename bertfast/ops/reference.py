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
    """Return dropout(LN(word[token] + token_type[type] + position[position])).

    Args:
        token_ids: int [T]; None if `word` holds the embedded tokens [T, H].
        token_type_ids: int [T].
        position_ids: int [T].
        word: [V, H], token embeddings.
        position: [positions, H], position embeddings.
        token_type: [types, H], token-type embeddings.
        gamma: [H], weight of the LayerNorm.
        beta: [H], bias of the LayerNorm.
        eps: ε of the LayerNorm.
        dropout: Dropout on the output; None: no dropout.
        padding_index: Row of `word` that gets no gradient; None: all rows get one.

    Returns:
        [T, H] in word's dtype.
    """
    tokens = word if token_ids is None else F.embedding(token_ids, word, padding_idx=padding_index)
    total = tokens + F.embedding(token_type_ids, token_type) + F.embedding(position_ids, position)
    return drop_hidden(layer_norm(total, gamma, beta, eps).to(tokens.dtype), dropout)


def rotary(qkv: Tensor, table: Tensor) -> Tensor:
    """Return qkv with queries and keys rotated by the angles of their positions.

    Args:
        qkv: [T, 3, A, D]: queries, keys and values.
        table: fp32 [T, D]: the cosines of D/2 angles, then their sines.

    Returns:
        [T, 3, A, D] in qkv's dtype.
    """
    x, y = accumulating(qkv[:, :2]).chunk(2, -1)  # [T, 2, A, D/2]
    cos, sin = table.to(x.dtype)[:, None, None].chunk(2, -1)
    rotated = torch.cat([x * cos - y * sin, y * cos + x * sin], -1)
    return torch.cat([rotated.to(qkv.dtype), qkv[:, 2:]], 1)


def attention(
    qkv: Tensor, sequences: Sequences, scale: float, causal: bool, window: int | None, dropout: Dropout | None
) -> Tensor:
    """Return dropout(softmax(Q K^T · scale)) V of each sequence.

    It takes memory in proportion to S · max_seqlen_bound²; `bertfast.ops.attention_fallback` takes less.

    Args:
        qkv: [T, 3, A, D]: queries, keys and values.
        sequences: Which slots belong to which sequence.
        scale: Factor of the attention scores.
        causal: Whether position i attends only to positions j <= i.
        window: Position i attends only to positions with |i - j| <= window; None: no limit.
        dropout: Dropout on the attention probabilities; None: no dropout.

    Returns:
        [T, A, D] in qkv's dtype, zero at padding slots.
    """
    probabilities, value = attention_probabilities(qkv, sequences, scale, causal, window, dropout)
    context = (probabilities.to(value.dtype) @ value).transpose(1, 2)
    return to_slots(context, sequences)


def attention_probabilities(
    qkv: Tensor, sequences: Sequences, scale: float, causal: bool, window: int | None, dropout: Dropout | None
) -> tuple[Tensor, Tensor]:
    """Compute the attention probabilities after dropout; the arguments are those of `attention`.

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
        query: [S, A, D], one query per sequence.
        qkv: [T, 3, A, D], of which only keys and values are read.
        sequences: Which slots belong to which sequence.
        scale: Factor of the attention scores.
        causal: The token attends to no key; see above.
        window: The token attends only to positions up to this one; None: no limit.
        dropout: Dropout on the attention probabilities; None: no dropout.

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
    """Return LN(residual + dropout(x + bias)).

    Args:
        x: [T, H], the output of a GEMM.
        residual: [T, H].
        bias: [H]; None: no bias.
        gamma: [H], weight of the LayerNorm.
        beta: [H], bias of the LayerNorm.
        eps: ε of the LayerNorm.
        dropout: Dropout on x + bias; None: no dropout.
        compute_dtype: Dtype of a second copy of the result; None: no copy.

    Returns:
        [T, H] in residual's dtype; with `compute_dtype` a pair of it and the copy.
    """
    x = accumulating(x)
    x = drop_hidden(x if bias is None else x + bias, dropout)
    y = layer_norm(x + residual, gamma, beta, eps)
    return y.to(residual.dtype) if compute_dtype is None else (y.to(residual.dtype), y.to(compute_dtype))


def bias_gelu(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    """Return gelu(x + bias).

    Args:
        x: [T, columns], the output of a GEMM.
        bias: [columns].
        approximate: "none": the exact GELU; "tanh": its approximation by tanh.

    Returns:
        [T, columns] in x's dtype.
    """
    return F.gelu(accumulating(x) + bias, approximate=approximate).to(x.dtype)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, approximate: str) -> Tensor:
    """Return gelu(x W^T + bias).

    Args:
        x: [T, H].
        weight: W, [columns, H].
        bias: [columns].
        approximate: "none": the exact GELU; "tanh": its approximation by tanh.

    Returns:
        [T, columns] in x's dtype, or that of autocast.
    """
    return F.gelu(F.linear(x, weight, bias), approximate=approximate)


def gelu_layer_norm(x: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """Return LN(gelu(x + bias)) with the exact GELU.

    Args:
        x: [R, H], the output of a GEMM.
        bias: [H].
        gamma: [H], weight of the LayerNorm.
        beta: [H], bias of the LayerNorm.
        eps: ε of the LayerNorm.

    Returns:
        [R, H] in gamma's dtype.
    """
    return layer_norm(F.gelu(accumulating(x) + bias), gamma, beta, eps).to(gamma.dtype)


def linear_cross_entropy(
    hidden: Tensor, rows: Tensor | None, weight: Tensor, bias: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the summed cross entropy of the logits hidden[rows] W^T + bias.

    All logits are materialised; `bertfast.ops.linear_cross_entropy_fallback` computes them in chunks.

    Args:
        hidden: [T, H].
        rows: int [R], the rows of `hidden` to read; None: all rows in order, R = T.
        weight: W, [V, H].
        bias: [V].
        labels: int [R]; rows with a negative label are ignored.

    Returns:
        The loss [] in nats, at least fp32, which a label of V or more makes NaN; how many rows predict their label,
        int64 []; how many have one, int64 [].
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
    """Return (x - mean) / sqrt(var + eps) · gamma + beta over the last dimension (Ba et al., 2016).

    Args:
        x: […, H].
        gamma: [H], weight.
        beta: [H], bias.
        eps: ε, added to the variance.

    Returns:
        […, H], at least fp32.
    """
    x = accumulating(x)
    with nullcontext() if autocast_dtype(x.device) is None else torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x, gamma.shape, gamma.to(x.dtype), beta.to(x.dtype), eps)


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
