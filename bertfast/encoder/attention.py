"""A layer's self-attention on packed tokens, all projections included but the last, for any model family.

T tokens, H hidden, A heads, D head dimension, K heads of keys and values.
"""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor

from bertfast import ops
from bertfast.encoder.linear import concatenated
from bertfast.encoder.parts import LayerParts
from bertfast.encoder.unpadding import Packed
from bertfast.ops import reference
from bertfast.ops.dropout import Dropout


class AttentionArguments(TypedDict):
    """The keyword arguments of `ops.attention`, see there."""

    scale: float
    causal: bool
    window: int | None
    dropout: Dropout | None


def attend(parts: LayerParts, hidden: Tensor, packed: Packed, index: int) -> Tensor:
    """Compute a layer's self-attention, projections included but the last: [T, H] -> [T, A D]."""
    qkv = project(parts, hidden)
    if parts.rotary is not None:
        assert packed.rotary is not None, "the batch was not prepared by `PackedModel.with_rotary`"
        qkv = ops.rotary(qkv, packed.rotary[parts.rotary])
    arguments = attention_arguments(parts, qkv.shape[3], packed, index)
    context = ops.attention(qkv, packed.sequences, **arguments)
    if packed.query_only:
        slots = len(context) - packed.query_only
        query_only = reference.query_only_attention(qkv[slots:, 0], qkv, packed.sequences, **arguments)
        context = torch.cat([context[:slots], query_only])
    return context.flatten(1)


def attention_arguments(parts: LayerParts, head_dimension: int, packed: Packed, index: int) -> AttentionArguments:
    """Return the keyword arguments of a layer's attention."""
    dropout = None if packed.rng is None else packed.rng.dropout(parts.attention_dropout, "attention", index)
    scale = head_dimension**-0.5 if parts.scale is None else parts.scale
    return {"scale": scale, "causal": parts.causal, "window": parts.window, "dropout": dropout}


def project(parts: LayerParts, hidden: Tensor) -> Tensor:
    """Compute queries, keys and values of all heads, in one GEMM where that is faster: [T, H] -> [T, 3, A, D]."""
    columns = concatenated(parts.qkv, hidden)
    if parts.query_groups == 1:
        heads = -1 if parts.heads is None else parts.heads
        width = -1 if parts.head_dimension is None else parts.head_dimension
        return torch.unflatten(columns, 1, (3, heads, width))
    # Each head of keys and values serves a group of heads of queries (Ainslie et al., 2023), and is repeated for them.
    assert parts.head_dimension is not None
    heads = columns.shape[1] // parts.head_dimension // (parts.query_groups + 2)  # of keys, and of values
    by_head = torch.unflatten(columns, 1, (parts.query_groups + 2, heads, parts.head_dimension))
    query, keys_and_values = by_head.split([parts.query_groups, 2], dim=1)
    return torch.cat(
        [query.flatten(1, 2)[:, None], keys_and_values.repeat_interleave(parts.query_groups, dim=2)], dim=1
    )
