"""The operations of BERT in plain PyTorch: specification, oracle of every test, and the fallback on any device.

Each function is the mathematics, differentiated by autograd, so no gradient here is written by hand and every one can
be checked in float64. Statistics, softmax and sums are fp32 at least. Activations are packed:
T tokens, H hidden, A heads, D head dimension, R gathered rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bertfast.dropout import Dropout, attention_keep, hidden_keep
from bertfast.sequences import Sequences

IGNORED = -100  # the label of a row that does not count

_LOGITS = 1 << 24  # elements of logits that exist at a time
_DRAWS = 1 << 24  # elements of attention masks that are drawn at a time


def embed(
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
    """dropout(LN(word[token] + token_type[type] + position[position])) -> [T, H]; see `bertfast.ops.embed`."""
    words = word if token_ids is None else F.embedding(token_ids, word, padding_idx=padding_index)
    total = words + F.embedding(token_type_ids, token_type) + F.embedding(position_ids, position)
    return drop_hidden(layer_norm(total, gamma, beta, eps).to(words.dtype), dropout)


def attention(
    qkv: Tensor, sequences: Sequences, scale: float, causal: bool, window: int | None, dropout: Dropout | None
) -> Tensor:
    """softmax(Q K^T · scale) V within each sequence -> [T, A, D], zero at inert places."""
    # One split for all: its gradient is one concatenation, where slices would each fill a whole d_qkv.
    *parts, inert = qkv.split([*sequences.lengths, sequences.capacity - sequences.num_tokens])
    outputs = [
        (probabilities.to(value.dtype) @ value).transpose(0, 1)
        for probabilities, value in attention_probabilities(
            parts, sequences.sequence_ids, scale, causal, window, dropout
        )
    ]
    zero = inert[:, 0].masked_fill(torch.ones_like(inert[:, 0], dtype=torch.bool), 0)  # with a gradient, of zero
    return torch.cat([*outputs, zero])


def attention_probabilities(
    parts: list[Tensor],
    numbers: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    dropout: Dropout | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each sequence of L > 0 tokens in turn: its probabilities [A, L, L], dropout applied, and its values [A, L, D].

    `parts` are the sequences' qkv [L, 3, A, D], `numbers` int64 [S] their numbers. Position i sees position j where
    j <= i if `causal`, and |i - j| <= window if there is one.
    """
    keeps = [None] * len(parts) if dropout is None else _attention_keeps(dropout, parts, numbers)
    for part, keep in zip(parts, keeps, strict=True):
        if len(part) == 0:
            continue
        query, key, value = part.permute(1, 2, 0, 3)
        hidden = _invisible(len(part), causal, window, part.device)
        yield _probabilities(query, key, scale, hidden, keep, dropout), value


def attend_from(
    query: Tensor, part: Tensor, number: Tensor, scale: float, window: int | None, dropout: Dropout | None
) -> Tensor:
    """Attention of one guest that is a query of a sequence without being a key of it -> [A, D].

    `query` is [A, D], `part` the sequence's own qkv [L, 3, A, D]; the guest draws its dropout as position L.
    """
    key, value = part[:, 1:].permute(1, 2, 0, 3)
    distance = torch.arange(len(part), device=part.device)
    hidden = None if window is None else distance > window
    guest = range(len(part), len(part) + 1)
    keep = None if dropout is None else attention_keep(dropout, number, len(query), len(part), guest)
    return (_probabilities(query[:, None], key, scale, hidden, keep, dropout).to(value.dtype) @ value)[:, 0]


def _attention_keeps(dropout: Dropout, parts: list[Tensor], numbers: Tensor) -> list[Tensor | None]:
    # Sequences of as many 16 x 16 tiles are drawn together: for short ones the calls cost more than the numbers.
    keeps: list[Tensor | None] = [None] * len(parts)
    alike = defaultdict(list)
    for index, part in enumerate(parts):
        if len(part):
            alike[-(-len(part) // 16)].append(index)
    for tiles, members in alike.items():
        heads = parts[members[0]].shape[2]
        at_once = max(_DRAWS // (heads * (16 * tiles) ** 2), 1)
        for start in range(0, len(members), at_once):
            some = members[start : start + at_once]
            drawn = attention_keep(dropout, numbers[some], heads, 16 * tiles, range(16 * tiles))
            for index, keep in zip(some, drawn, strict=True):
                keeps[index] = keep[:, : len(parts[index]), : len(parts[index])]
    return keeps


def _invisible(length: int, causal: bool, window: int | None, device) -> Tensor | None:
    if not causal and window is None:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    hidden = distance < 0 if causal else torch.zeros_like(distance, dtype=torch.bool)
    return hidden if window is None else hidden | (distance.abs() > window)


def _probabilities(
    query: Tensor,
    key: Tensor,
    scale: float,
    hidden: Tensor | None,
    keep: Tensor | None,
    dropout: Dropout | None,
) -> Tensor:
    # Q K^T · scale with the scale inside the product, before its result is rounded.
    scores = _accumulating(torch.baddbmm(query.new_zeros(1), query, key.mT, beta=0, alpha=scale))
    if hidden is not None:
        scores = scores.masked_fill(hidden, -math.inf)
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
) -> Tensor:
    """LN(residual + dropout(x + bias)) -> [T, H] in the residual's dtype."""
    x = _accumulating(x)
    x = drop_hidden(x if bias is None else x + bias, dropout)
    return layer_norm(x + residual, gamma, beta, eps).to(residual.dtype)


def bias_gelu(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    """gelu(x + bias) -> as x."""
    return F.gelu(_accumulating(x) + bias, approximate=approximate).to(x.dtype)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, approximate: str) -> Tensor:
    """gelu(x W^T + bias) -> [T, columns]."""
    return F.gelu(F.linear(x, weight, bias), approximate=approximate)


def gelu_layer_norm(x: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """LN(gelu(x + bias)), exact GELU -> [R, H] in the parameters' dtype."""
    return layer_norm(F.gelu(_accumulating(x) + bias), gamma, beta, eps).to(gamma.dtype)


def linear_cross_entropy_forward(
    hidden: Tensor, rows: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    """Sum of cross entropies of hidden[rows] W^T + bias -> (loss [], correct int64 [], counted int64 [], *gradients).

    The gradients are those of the loss for (hidden [T, H], weight [V, H], bias [V]), None where not `wanted`: with a
    chunk's logits at hand they cost two products, later also the first one again.
    """
    loss = _accumulating(hidden.new_zeros(()))
    correct = labels.new_zeros(())
    d_hidden, d_weight, d_bias = (
        torch.zeros_like(x, dtype=loss.dtype) if want else None
        for x, want in zip((hidden, weight, bias), wanted, strict=True)
    )
    chunk = max(_LOGITS // weight.shape[0], 1)
    for some, label in zip(rows.split(chunk), labels.split(chunk), strict=True):
        counted = label >= 0
        x = hidden[some].masked_fill(~counted[:, None], 0)  # an unused place may hold anything, NaN too
        logits = _accumulating(F.linear(x, weight, bias))
        target = label.clamp(min=0).long()[:, None]
        logsumexp = logits.logsumexp(1, keepdim=True)
        loss += ((logsumexp - logits.gather(1, target)).squeeze(1) * counted).sum()
        correct += ((logits.argmax(1) == label) & counted).sum()
        if not any(wanted):
            continue
        d_logits = (logits - logsumexp).exp_()
        d_logits.scatter_add_(1, target, d_logits.new_full((1, 1), -1.0).expand_as(target))
        d_logits *= counted[:, None]
        if d_bias is not None:
            d_bias += d_logits.sum(0)
        d_logits = d_logits.to(x.dtype)
        if d_hidden is not None:
            d_hidden.index_add_(0, some, (d_logits @ weight.to(x.dtype)).to(d_hidden.dtype))
        if d_weight is not None:
            d_weight += d_logits.mT @ x
    gradients = (
        None if d is None else d.to(x.dtype)
        for d, x in zip((d_hidden, d_weight, d_bias), (hidden, weight, bias), strict=True)
    )
    return loss, correct, (labels >= 0).sum(), *gradients


def layer_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) · gamma + beta over the last dimension, in fp32 at least (Ba et al., 2016)."""
    x = _accumulating(x)
    with torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x, gamma.shape, gamma.to(x.dtype), beta.to(x.dtype), eps)


def drop_hidden(x: Tensor, dropout: Dropout | None) -> Tensor:
    """dropout(x) of activations [T, H]."""
    if dropout is None:
        return x
    return x * _factors(hidden_keep(dropout, x.shape[1]), dropout, x.dtype)


def _factors(keep: Tensor, dropout: Dropout, dtype: torch.dtype) -> Tensor:
    # One factor an element, 0 or the scale: one product forward and one backward, of one dtype, which are fast.
    return keep.to(dtype).mul_(dropout.scale)


def _accumulating(x: Tensor) -> Tensor:
    # Half precisions are raised to fp32; float64 stays, so that the definitions can be checked in it.
    return x.to(torch.promote_types(x.dtype, torch.float32))
