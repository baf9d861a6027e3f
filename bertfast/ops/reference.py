"""The operations of BERT in plain PyTorch: the specification, the oracle of the tests, and a fallback on any device.

Autograd differentiates each function, so that no gradient is written by hand, and all can be checked in float64.
Statistics, softmax and sums are at least fp32. Activations are packed: T token slots, S sequences, H hidden size,
A heads, D head dimension, R gathered rows, V vocabulary size. What several operations share is in `reference_parts`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bertfast.ops.dropout import Dropout, attention_keep, attention_keep_at
from bertfast.ops.reference_parts import (
    accumulating,
    add_residual,
    drop_hidden,
    layer_norm,
    masked_softmax,
    not_attended,
    rms_norm,
    to_rows,
    to_slots,
)
from bertfast.ops.sequences import Sequences

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
    beta: Tensor | None,
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
        beta: [H], bias of the LayerNorm; None: no bias.
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


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor | None,
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
        beta: [H], bias of the LayerNorm; None: no bias.
        eps: ε of the LayerNorm.
        dropout: Dropout on x + bias; None: no dropout.
        compute_dtype: Dtype of a second copy of the result; None: no copy.

    Returns:
        [T, H] in residual's dtype; with `compute_dtype` a pair of it and the copy.
    """
    y = layer_norm(add_residual(x, residual, bias, dropout), gamma, beta, eps)
    return y.to(residual.dtype) if compute_dtype is None else (y.to(residual.dtype), y.to(compute_dtype))


def pre_norm(
    x: Tensor | None,
    residual: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor | None,
    eps: float,
    dropout: Dropout | None,
    rms: bool,
    norm_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return stream = residual + dropout(x + bias) and its LayerNorm or RMSNorm.

    Args:
        x: [T, H], the output of a GEMM; None: nothing is added, and the stream is `residual`.
        residual: [T, H].
        bias: [H]; None: no bias.
        gamma: [H], weight of the norm.
        beta: [H], bias of the LayerNorm; None: no bias.
        eps: ε of the norm.
        dropout: Dropout on x + bias; None: no dropout.
        rms: RMSNorm instead of LayerNorm; it has no beta.
        norm_dtype: Dtype of the normalised stream.

    Returns:
        The stream [T, H] in residual's dtype, and the norm [T, H] of these rounded values in `norm_dtype`.
    """
    stream = residual if x is None else add_residual(x, residual, bias, dropout).to(residual.dtype)
    normed = rms_norm(stream, gamma, eps) if rms else layer_norm(stream, gamma, beta, eps)
    return stream, normed.to(norm_dtype)


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


def gated_activation(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Return act(x[:, :I] + bias[:I]) · (x[:, I:] + bias[I:]) (Shazeer, 2020).

    Args:
        x: [T, 2 I], the output of a GEMM.
        bias: [2 I]; None: no bias.
        activation: "gelu": the exact GELU; "gelu_tanh": its approximation by tanh; "silu".

    Returns:
        [T, I] in x's dtype.
    """
    hidden, gate = (accumulating(x) if bias is None else accumulating(x) + bias).chunk(2, 1)
    if activation == "silu":
        activated = F.silu(hidden)
    else:
        activated = F.gelu(hidden, approximate="tanh" if activation == "gelu_tanh" else "none")
    return (activated * gate).to(x.dtype)


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


def gelu_layer_norm(x: Tensor, bias: Tensor | None, gamma: Tensor, beta: Tensor | None, eps: float) -> Tensor:
    """Return LN(gelu(x + bias)) with the exact GELU.

    Args:
        x: [R, H], the output of a GEMM.
        bias: [H]; None: no bias.
        gamma: [H], weight of the LayerNorm.
        beta: [H], bias of the LayerNorm; None: no bias.
        eps: ε of the LayerNorm.

    Returns:
        [R, H] in gamma's dtype.
    """
    x = accumulating(x)
    return layer_norm(F.gelu(x if bias is None else x + bias), gamma, beta, eps).to(gamma.dtype)


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


def packed_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    factors: Tensor,
    bias: Tensor,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """Return activation(x W^T + bias) of a weight in fp32, bf16 or int8.

    Args:
        x: [T, K].
        weight: [N, K], in int8 divided by its scales.
        scales: fp32 [N]; empty unless the weight is int8.
        factors: fp32 [K], factors of x; empty: 1.
        bias: [N]; empty: no bias.
        activation: "none", "gelu" or "gelu_tanh".
        dtype: Dtype of the result.
    """
    if weight.dtype == torch.int8:
        x = accumulating(x) * factors if len(factors) else accumulating(x)
        # A token's zero point, by which the kernels shift its values into a byte, does not change the results.
        with_zero = F.pad(x, (0, 1))  # which the range of a token contains, also without columns
        span = with_zero.amax(dim=1, keepdim=True) - with_zero.amin(dim=1, keepdim=True)
        finite = span.isfinite() & (span > 1e-30)
        quantised = torch.where(finite, x * (254 / span), 0).round()
        scale = torch.where(span.isfinite(), span / 254, torch.nan)
        y = (quantised @ weight.to(x.dtype).T) * scale * scales
    else:
        y = accumulating(x.to(weight.dtype)) @ accumulating(weight).T
    return activated(y + bias if len(bias) else y, activation).to(dtype)


def activated(x: Tensor, activation: str) -> Tensor:
    """Return x, its GELU or the approximation of that: `activation` is "none", "gelu" or "gelu_tanh"."""
    return x if activation == "none" else F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
