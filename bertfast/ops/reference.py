"""The operations of BERT in plain PyTorch: specification, oracle of every test, and the fallback on any device.

Each function is the mathematics, differentiated by autograd, so no gradient here is written by hand and every one can
be checked in float64. Statistics, softmax and sums are fp32 at least. Activations are packed:
T tokens, H hidden, A heads, D head dimension, R gathered rows, V vocabulary.
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

IGNORE_INDEX = -100  # the label of a row that does not count


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
    """dropout(LN(word[token] + token_type[type] + position[position])) -> [T, H]; see `bertfast.ops.embeddings`."""
    words = word if token_ids is None else F.embedding(token_ids, word, padding_idx=padding_index)
    total = words + F.embedding(token_type_ids, token_type) + F.embedding(position_ids, position)
    return drop_hidden(layer_norm(total, gamma, beta, eps).to(words.dtype), dropout)


def attention(
    qkv: Tensor, sequences: Sequences, scale: float, causal: bool, window: int | None, dropout: Dropout | None
) -> Tensor:
    """softmax(Q K^T · scale) V within each sequence -> [T, A, D], zero at padding slots.

    The memory it takes grows with S · max_seqlen_bound²; `bertfast.ops.attention_fallback` computes the same in less.
    """
    probabilities, value = attention_probabilities(qkv, sequences, scale, causal, window, dropout)
    context = (probabilities.to(value.dtype) @ value).transpose(1, 2)
    return to_slots(context, sequences)


def attention_probabilities(
    qkv: Tensor, sequences: Sequences, scale: float, causal: bool, window: int | None, dropout: Dropout | None
) -> tuple[Tensor, Tensor]:
    """Compute all probabilities, dropout applied -> ([S, A, N, N], values [S, A, N, D]), N being max_seqlen_bound.

    Position i attends to position j where j <= i if `causal`, and |i - j| <= window if there is one. Rows of positions
    that a sequence does not have hold anything finite; its columns of such positions are zero.
    """
    query, key, value = to_rows(qkv, sequences).permute(2, 0, 3, 1, 4)
    bound = sequences.max_seqlen_bound
    present = torch.arange(bound, device=qkv.device) < sequences.cu_seqlens.diff()[:, None]  # [S, N]
    masked = ~present[:, None, :]
    outside = not_attended(bound, causal, window, qkv.device)
    masked = masked if outside is None else masked | outside
    # Absent queries attend to everything: a softmax over nothing would be NaN, and so would its gradient.
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
    """Attention of one query-only token per sequence, which is a query without being a key -> [S, A, D].

    `query` is [S, A, D]. The token stands before its whole sequence: `causal`, it attends to nothing, which gives zero,
    as an empty sequence does. It draws its dropout at the position behind the last token.
    """
    if causal:
        return torch.zeros_like(query)
    key, value = to_rows(qkv[:, 1:], sequences).permute(2, 0, 3, 1, 4)
    bound, lengths = sequences.max_seqlen_bound, sequences.cu_seqlens.diff()[:, None]
    position = torch.arange(bound, device=qkv.device)
    masked = position >= lengths
    masked = masked if window is None else masked | (position > window)
    masked = masked & (lengths > 0)  # all values of an empty sequence are zero
    keep = None
    if dropout is not None:
        keep = attention_keep_at(dropout, sequences.sequence_ids, query.shape[1], bound, lengths[:, 0].long())
        keep = keep[:, :, None]
    probabilities = masked_softmax(query[:, :, None], key, scale, masked[:, None, None], keep, dropout)
    return (probabilities.to(value.dtype) @ value)[:, :, 0]


def to_rows(x: Tensor, sequences: Sequences) -> Tensor:
    """Gather packed values [T, …] into one row per sequence [S, max_seqlen_bound, …], zero behind its last token."""
    position = torch.arange(sequences.max_seqlen_bound, device=x.device)
    index = sequences.cu_seqlens[:-1, None] + position
    # Absent positions read a row of zeros behind the last slot, whatever, NaN too, other slots hold.
    index = torch.where(position < sequences.cu_seqlens.diff()[:, None], index, len(x))
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[index]


def to_slots(rows: Tensor, sequences: Sequences) -> Tensor:
    """Put rows [S, max_seqlen_bound, …] back into packed slots [T, …], zero at padding slots."""
    count, bound, *shape = rows.shape
    index = sequences.sequence_index * bound + sequences.position
    index = torch.where(sequences.is_token, index, count * bound)
    return torch.cat([rows.flatten(0, 1), rows.new_zeros(1, *shape)])[index]


def not_attended(length: int, causal: bool, window: int | None, device: torch.device) -> Tensor | None:
    """Return which keys (columns) a query (row) of the same sequence may not attend to, bool [L, L]; None: it may all.

    It may always attend to itself.
    """
    if not causal and window is None:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    masked = distance < 0 if causal else torch.zeros_like(distance, dtype=torch.bool)
    return masked if window is None else masked | (distance.abs() > window)


def masked_softmax(
    query: Tensor, key: Tensor, scale: float, masked: Tensor | None, keep: Tensor | None, dropout: Dropout | None
) -> Tensor:
    """dropout(softmax(Q K^T · scale)) where not `masked`, [..., Q, D] and [..., K, D] -> [..., Q, K], fp32 at least."""
    # The scale goes into the GEMM, before its result is rounded.
    flat = torch.baddbmm(query.new_zeros(1), query.flatten(0, -3), key.flatten(0, -3).mT, beta=0, alpha=scale)
    scores = accumulating(flat.unflatten(0, query.shape[:-2]))
    if masked is not None:
        scores = scores.masked_fill(masked, -math.inf)
    probabilities = scores.softmax(-1)
    return probabilities if keep is None else probabilities * _factors(keep, dropout, probabilities.dtype)


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
    """Return LN(residual + dropout(x + bias)), [T, H] in the residual's dtype; with `compute_dtype` also in that."""
    x = accumulating(x)
    x = drop_hidden(x if bias is None else x + bias, dropout)
    y = layer_norm(x + residual, gamma, beta, eps)
    return y.to(residual.dtype) if compute_dtype is None else (y.to(residual.dtype), y.to(compute_dtype))


def bias_gelu(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    """gelu(x + bias) -> as x."""
    return F.gelu(accumulating(x) + bias, approximate=approximate).to(x.dtype)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, approximate: str) -> Tensor:
    """gelu(x W^T + bias) -> [T, columns]."""
    return F.gelu(F.linear(x, weight, bias), approximate=approximate)


def gelu_layer_norm(x: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """LN(gelu(x + bias)), exact GELU -> [R, H] in the parameters' dtype."""
    return layer_norm(F.gelu(accumulating(x) + bias), gamma, beta, eps).to(gamma.dtype)


def linear_cross_entropy(
    hidden: Tensor, rows: Tensor | None, weight: Tensor, bias: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of cross entropies of hidden[rows] W^T + bias -> (loss [], correct int64 [], counted int64 []).

    Without `rows` all rows of hidden are read in order. A label outside of the vocabulary makes the loss NaN. All
    logits exist at once; `bertfast.ops.linear_cross_entropy_fallback` computes the same in chunks.
    """
    counted = labels >= 0
    x = hidden if rows is None else hidden[rows]
    x = x.masked_fill(~counted[:, None], 0)  # the row of an unused slot may hold anything, NaN too
    logits = accumulating(F.linear(x, weight, bias))
    target = labels.clamp(0, len(weight) - 1).long()[:, None]
    losses = (logits.logsumexp(1) - logits.gather(1, target).squeeze(1)) * counted
    loss = losses.masked_fill(labels >= len(weight), math.nan).sum()
    correct = ((logits.detach().argmax(1) == labels) & counted).sum()
    return loss, correct, counted.sum()


def layer_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) · gamma + beta over the last dimension, in fp32 at least (Ba et al., 2016)."""
    x = accumulating(x)
    with nullcontext() if autocast_dtype(x.device) is None else torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x, gamma.shape, gamma.to(x.dtype), beta.to(x.dtype), eps)


def drop_hidden(x: Tensor, dropout: Dropout | None) -> Tensor:
    """dropout(x) of activations [T, H]."""
    if dropout is None:
        return x
    return x * _factors(hidden_keep(dropout, x.shape[1]), dropout, x.dtype)


def _factors(keep: Tensor, dropout: Dropout, dtype: torch.dtype) -> Tensor:
    # One factor an element, 0 or the scale: one product forward and one backward, of one dtype, which are fast.
    return keep.to(dtype).mul_(dropout.scale)


def accumulating(x: Tensor) -> Tensor:
    # Half precisions are raised to fp32; float64 stays, so that the definitions can be checked in it.
    return x.to(torch.promote_types(x.dtype, torch.float32))
