"""One post-norm transformer layer (Devlin et al., 2019) as functions on packed tokens, for any model family.

T tokens, R gathered rows, H hidden, A heads, D head dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bertfast import ops, products, reference
from bertfast.encoder.linear import is_plain
from bertfast.encoder.parts import LayerParts
from bertfast.inputs import Packed

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish", "tanh")
"""The activations of feed-forward layers that run packed, by their names in a configuration."""

_TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh")
_PLAIN_ACTIVATIONS = {"relu": F.relu, "silu": F.silu, "swish": F.silu, "tanh": torch.tanh}


def layer(parts: LayerParts, hidden: Tensor, packed: Packed, index: int, rows: Tensor | None = None) -> Tensor:
    """Run a layer: attention over all tokens [T, H], then all that follows.

    Args:
        parts: The layer's modules and options.
        hidden: [T, H], what the layer before it gave.
        packed: The batch.
        index: Number of the layer, from which its dropout draws.
        rows: int64 [R]; if given, what follows attention runs on these rows alone.

    Returns:
        [T, H], or [R, H] with `rows`.
    """
    identity = packed.identity
    context = attend(parts, hidden, packed, index)
    if rows is not None:
        context, hidden = context[rows], hidden[rows]
        identity = identity and identity.at(rows)
    dropout = identity and identity.dropout(parts.attention_output_dropout, "attention_output", index)
    hidden = _add_layer_norm(parts.attention_dense, parts.attention_norm, context, hidden, dropout)
    intermediate = activate(parts.intermediate_dense, hidden, parts.activation)
    dropout = identity and identity.dropout(parts.output_dropout, "output", index)
    return _add_layer_norm(parts.output_dense, parts.output_norm, intermediate, hidden, dropout)


def attend(parts: LayerParts, hidden: Tensor, packed: Packed, index: int) -> Tensor:
    """Compute a layer's self-attention, projections included but the last: [T, H] -> [T, H]."""
    qkv = project(parts, hidden)
    arguments = attention_arguments(parts, qkv.shape[3], packed, index)
    context = ops.attention(qkv, packed.sequences, **arguments)
    if packed.query_only:
        slots = len(context) - packed.query_only
        own = reference.query_only_attention(qkv[slots:, 0], qkv, packed.sequences, **arguments)
        context = torch.cat([context[:slots], own])
    return context.flatten(1)


def attention_arguments(parts: LayerParts, head_dimension: int, packed: Packed, index: int) -> dict:
    """Return what a layer's attention takes besides qkv and sequences."""
    dropout = packed.identity and packed.identity.dropout(parts.attention_dropout, "attention", index)
    scale = head_dimension**-0.5 if parts.scale is None else parts.scale
    return {"scale": scale, "causal": parts.causal, "window": None, "dropout": dropout}


def project(parts: LayerParts, hidden: Tensor) -> Tensor:
    """Compute queries, keys and values of all heads, in one GEMM where that is faster: [T, H] -> [T, 3, A, D]."""
    linears = (parts.query, parts.key, parts.value)
    if all(is_plain(linear) for linear in linears):
        qkv = _project_at_once(linears, hidden)
    else:
        qkv = torch.cat([linear(hidden) for linear in linears], dim=1)
    return qkv.unflatten(1, (3, parts.heads, -1))


def _project_at_once(linears: tuple[nn.Module, ...], hidden: Tensor) -> Tensor:
    """Compute three plain projections: [T, H] -> [T, 3 H]."""
    rows, columns = linears[0].weight.shape
    compiling = torch.compiler.is_compiling()
    # Whatever has to be copied to make one tensor of three, copy the smaller: the weights, or the results. In half
    # precision three GEMMs round differently from the single one that a compiler is given.
    copy_results = not compiling and hidden.dtype == torch.float32 and len(hidden) < columns
    differentiable = torch.is_grad_enabled() or torch.is_autocast_enabled(hidden.device.type) or compiling
    if not differentiable and not products.goes_to_onednn(hidden, linears[0].weight):  # oneDNN has no `out=`
        qkv = hidden.new_empty(len(hidden), 3 * rows)
        for linear, part in zip(linears, qkv.chunk(3, dim=1), strict=True):
            torch.addmm(linear.bias, hidden, linear.weight.t(), out=part)
        return qkv
    if copy_results:
        return torch.cat([products.linear(hidden, linear.weight, linear.bias) for linear in linears], dim=1)
    weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
    return products.linear(hidden, torch.cat(weights), torch.cat(biases))


def activate(dense: nn.Module, x: Tensor, activation: str) -> Tensor:
    """Compute activation(dense(x)), in one operation where it is a GELU of a plain linear layer."""
    approximate = "tanh" if activation in _TANH_GELUS else "none"
    if activation in _PLAIN_ACTIVATIONS:
        return _PLAIN_ACTIVATIONS[activation](dense(x))
    if is_plain(dense):
        return ops.linear_gelu(x, dense.weight, dense.bias, approximate)
    return F.gelu(dense(x), approximate=approximate)


def _add_layer_norm(dense: nn.Module, norm: nn.LayerNorm, x: Tensor, residual: Tensor, dropout) -> Tensor:
    product, bias = (products.linear(x, dense.weight), dense.bias) if is_plain(dense) else (dense(x), None)
    return ops.add_layer_norm(product, residual, bias, norm.weight, norm.bias, norm.eps, dropout)
