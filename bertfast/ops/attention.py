"""Multi-head attention within each sequence of a packed batch (Vaswani et al., 2017, section 3.2)."""

from __future__ import annotations

import math

from torch import Tensor

from bertfast import reference
from bertfast.dropout import Dropout
from bertfast.ops.choice import Implementation, check, choose
from bertfast.sequences import Sequences


def attention(
    qkv: Tensor,
    sequences: Sequences,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
    dropout: Dropout | None = None,
    implementation: Implementation | None = None,
) -> Tensor:
    """dropout(softmax(Q K^T · scale)) V, each sequence to itself.

    Args:
        qkv: [T, 3, A, D], floating point: queries, keys and values.
        sequences: which of the T places belong to which sequence.
        scale: of the scores, 1 / sqrt(D) unless given.
        causal: position i sees no position after it.
        window: position i sees only positions at most this far away.
        dropout: of the probabilities; fewer than 256 heads then.
        implementation: force one; default is the fastest offered.

    Returns:
        [T, A, D] in qkv's dtype; zero, like the gradient, at places that belong to no sequence.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option does not fit; the message names it.
    """
    check(
        "attention",
        dropout,
        qkv=(qkv, "tokens 3 heads head_dimension", "floating"),
        cu_seqlens=(sequences.cu_seqlens, "sequences+1", "integer"),
    )
    if len(qkv) != sequences.tokens:
        raise ValueError(f"attention: qkv holds {len(qkv)} tokens, the sequences are packed into {sequences.tokens}")
    if dropout is not None and qkv.shape[2] >= 256:
        raise ValueError(f"attention: dropout numbers fewer than 256 heads, got {qkv.shape[2]}")
    if window is not None and window < 0:
        raise ValueError(f"attention: window must not be negative, got {window}")
    choose("attention", implementation, qkv)
    scale = 1 / math.sqrt(qkv.shape[3]) if scale is None else scale
    return reference.attention(qkv, sequences, scale, causal, window, dropout)
