"""From packed tokens to the last layer's output, for any model family.

T tokens, R gathered rows, H hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bertfast import ops
from bertfast.encoder.layer import copy_dtype
from bertfast.encoder.linear import apply_linear, is_plain, is_watched
from bertfast.encoder.norm import normalise
from bertfast.encoder.packed_linear import is_frozen
from bertfast.encoder.parts import EmbeddingParts, PackedModel
from bertfast.encoder.unpadding import Packed
from bertfast.ops import matmul
from bertfast.runtime.malloc import reuse_freed_memory


def embed(parts: EmbeddingParts, packed: Packed) -> Tensor:
    """Compute the embeddings of packed tokens -> [T, H]."""
    rng, tokens = packed.rng, parts.token_embeddings
    words = tokens.weight if packed.embeddings is None else packed.embeddings
    token_type_ids, types = _table(parts.token_type_embeddings, packed.token_type_ids, parts.norm.weight)
    position_ids, positions = _table(parts.position_embeddings, packed.position_ids, parts.norm.weight)
    return ops.embeddings(
        packed.token_ids,
        token_type_ids,
        position_ids,
        words,
        positions,
        types,
        parts.norm.weight,
        parts.norm.bias,
        parts.norm.eps,
        None if rng is None else rng.dropout(parts.dropout, "embeddings"),
        padding_index=tokens.padding_idx,
    )


def _table(module: nn.Embedding | None, ids: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ids and the weight of an embedding table; of one that a family does not have, zeros like gamma [H]."""
    if module is None:
        return torch.zeros_like(ids), gamma.new_zeros(1, len(gamma))
    weight: Tensor = module.weight
    if module.padding_idx is not None and weight.requires_grad and torch.is_grad_enabled():
        row = torch.arange(len(weight), device=weight.device)[:, None] == module.padding_idx
        weight = torch.where(row, weight.detach(), weight)  # this row gets no gradient
    return ids, weight


def encode(
    model: PackedModel,
    packed: Packed,
    rows: Tensor | None = None,
    hidden_states: list[Tensor] | None = None,
    *,
    residual_dtype: torch.dtype | None = None,
) -> Tensor:
    """Run the embeddings and all layers on packed tokens.

    Args:
        model: The encoder; its embeddings and layers are called as modules, so that FSDP2 and activation
            checkpointing see them.
        packed: The batch.
        rows: int64 [R]; if given, the last layer computes its output at these alone.
        hidden_states: Receives what enters the first layer and what leaves each one, [T, H] of the residual stream.
        residual_dtype: The dtype of the residual stream; None: that of the embeddings.

    Returns:
        [T, H], or [R, H] with `rows`, in the dtype of the residual stream.
    """
    embeddings, layers = model.packed_modules()
    packed, norm = model.with_rotary(packed), model.output_norm()
    hidden: Tensor = embeddings(packed)
    if residual_dtype is not None:
        hidden = hidden.to(residual_dtype)
    if hidden.is_cpu and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        reuse_freed_memory()
    # Post-norm layers hand each other the copy of the stream that GEMMs read, where both neighbours take it.
    copies = copy_dtype(hidden) is not None
    takes = [copies and norm is None and _takes_copy(module) for module in layers]
    copy: Tensor | None = None
    for index, module in enumerate(layers):
        if hidden_states is not None:
            hidden_states.append(hidden)
        last = index == len(layers) - 1
        arguments = (hidden, packed, index, rows if last else None)
        if not last and takes[index] and takes[index + 1]:
            hidden, copy = module(*arguments, copy, True)
        else:
            hidden = module(*arguments) if copy is None else module(*arguments, copy)
            copy = None
    if rows is not None and not len(layers):
        (hidden,) = ops.gather(rows, hidden)
    if norm is not None:
        hidden = normalise(norm, hidden)
    if hidden_states is not None:
        hidden_states.append(hidden)
    return hidden


def _takes_copy(module: nn.Module) -> bool:
    """Return whether a post-norm layer is called with, and for, a copy of the residual stream.

    One that is watched is not, so that hooks see the stream alone, nor one whose activations are recomputed, which
    would keep the copy besides the stream, nor a frozen one, whose GEMMs round what they read.
    """
    recomputes = getattr(module, "gradient_checkpointing", False)
    return not is_watched(module) and not recomputes and not is_frozen(module)


def transform(dense: nn.Module, activation: nn.Module | None, norm: nn.LayerNorm, hidden: Tensor) -> Tensor:
    """Compute the masked-LM head's transform, norm(activation(dense(hidden))): [R, H] -> [R, H].

    Args:
        dense: A linear layer.
        activation: None: GELU.
        norm: The LayerNorm.
        hidden: [R, H], the encoder's output.
    """
    if activation is not None or not is_plain(dense):
        rows = apply_linear(dense, hidden)
        rows = F.gelu(rows) if activation is None else activation(rows)
        output: Tensor = norm(rows)
        return output
    return ops.gelu_layer_norm(matmul.linear(hidden, dense.weight), dense.bias, norm.weight, norm.bias, norm.eps)
