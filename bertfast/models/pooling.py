"""Poolings: the embedding of a text from the hidden states of its tokens, as sentence-transformers defines them.

Shapes: S texts, T packed tokens, H size of a hidden state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def pool(hidden: Tensor, lengths: Tensor, modes: Sequence[str], skipped: int = 0) -> Tensor:
    """Pool the hidden states of each text.

    Args:
        hidden: fp32 [T, H], the hidden states of packed tokens.
        lengths: int64 [S], the number of tokens of each text, all above `skipped`.
        modes: Keys of `POOLINGS`, whose results are concatenated.
        skipped: Number of first tokens, those of a prompt, that are not pooled.

    Returns:
        fp32 [S, modes × H].
    """
    positions = torch.arange(len(hidden), device=hidden.device) - (lengths.cumsum(0) - lengths).repeat_interleave(
        lengths
    )
    if skipped:
        kept = positions >= skipped
        hidden, positions, lengths = hidden[kept], positions[kept], lengths - skipped
    return torch.cat([POOLINGS[mode](hidden, lengths, positions) for mode in modes], 1)


def _first(hidden: Tensor, lengths: Tensor, positions: Tensor) -> Tensor:
    return hidden[lengths.cumsum(0) - lengths]


def _last(hidden: Tensor, lengths: Tensor, positions: Tensor) -> Tensor:
    return hidden[lengths.cumsum(0) - 1]


def _max(hidden: Tensor, lengths: Tensor, positions: Tensor) -> Tensor:
    return torch.segment_reduce(hidden, "max", lengths=lengths)


def _mean(hidden: Tensor, lengths: Tensor, positions: Tensor) -> Tensor:
    return torch.segment_reduce(hidden, "mean", lengths=lengths)


def _mean_sqrt_len(hidden: Tensor, lengths: Tensor, positions: Tensor) -> Tensor:
    return torch.segment_reduce(hidden, "sum", lengths=lengths) / lengths.sqrt()[:, None]


def _weighted_mean(hidden: Tensor, lengths: Tensor, positions: Tensor) -> Tensor:
    weights = (positions + 1).to(hidden.dtype)  # those after a prompt that is not pooled keep their positions
    sums = torch.segment_reduce(hidden * weights[:, None], "sum", lengths=lengths)
    return sums / torch.segment_reduce(weights, "sum", lengths=lengths)[:, None]


POOLINGS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "cls": _first,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt_len,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}
"""By the names of sentence-transformers: functions of hidden states, lengths, and the position of each token."""
