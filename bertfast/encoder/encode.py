"""From packed tokens to the last layer's output, for any model family.

T tokens, R gathered rows, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bertfast import ops, products, reference
from bertfast.encoder.layer import activate
from bertfast.encoder.linear import is_plain
from bertfast.encoder.parts import EmbeddingParts, PackedModel
from bertfast.inputs import Packed
from bertfast.memory import keep_freed_memory


def embed(parts: EmbeddingParts, packed: Packed) -> Tensor:
    """Compute the embeddings of packed tokens -> [T, H]."""
    return ops.embed(
        packed.token_ids,
        packed.token_type_ids,
        packed.position_ids,
        parts.words.weight if packed.embeddings is None else packed.embeddings,
        parts.positions.weight,
        parts.token_types.weight,
        parts.norm.weight,
        parts.norm.bias,
        parts.norm.eps,
        packed.identity and packed.identity.dropout(parts.dropout, "embeddings"),
        padding_index=parts.words.padding_idx,
    )


def encode(
    model: PackedModel, packed: Packed, rows: Tensor | None = None, hidden_states: list[Tensor] | None = None
) -> Tensor:
    """Run the embeddings and all layers on packed tokens.

    Args:
        model: The encoder; its embeddings and layers are called as modules, so that FSDP2 and activation
            checkpointing see them.
        packed: The batch.
        rows: int64 [R]; if given, the last layer runs on these rows alone behind its attention.
        hidden_states: Receives what enters the first layer and what leaves each one, [T, H] each.

    Returns:
        [T, H], or [R, H] with `rows`.
    """
    embeddings, layers = model.packed_modules()
    hidden = embeddings(packed)
    if hidden.is_cpu and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        keep_freed_memory()
    for index, module in enumerate(layers):
        if hidden_states is not None:
            hidden_states.append(hidden)
        hidden = module(hidden, packed, index, rows if index == len(layers) - 1 else None)
    if hidden_states is not None:
        hidden_states.append(hidden)
    return hidden if rows is None or len(layers) else hidden[rows]


def pool(module: nn.Module, first: Tensor) -> Tensor:
    """Compute the pooler on the rows that represent their sequences: [S, H] -> [S, H]."""
    return torch.tanh(module.dense(first))


def transform(dense: nn.Module, norm: nn.LayerNorm, hidden: Tensor, activation: str) -> Tensor:
    """Compute what the masked-LM head does before the vocabulary: [R, H] -> [R, H]."""
    if activation == "gelu" and is_plain(dense):
        product = products.linear(hidden, dense.weight)
        return ops.gelu_layer_norm(product, dense.bias, norm.weight, norm.bias, norm.eps)
    normalised = reference.layer_norm(activate(dense, hidden, activation), norm.weight, norm.bias, norm.eps)
    return normalised.to(norm.weight.dtype)
