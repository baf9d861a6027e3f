"""One post-norm transformer layer (Devlin et al., 2019) as functions on packed tokens, for any model family.

T tokens, R gathered rows, H hidden, A heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bertfast import ops
from bertfast.encoder.linear import is_plain
from bertfast.encoder.parts import LayerParts
from bertfast.encoder.unpadding import Packed
from bertfast.ops import matmul, reference
from bertfast.ops.dropout import Dropout, RngCoordinates
from bertfast.runtime.torch_compat import autocast_dtype

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish", "tanh")
"""The activations of feed-forward layers that run packed, by their names in a configuration."""

_TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh")
_PLAIN_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


def layer(
    parts: LayerParts,
    hidden: Tensor,
    packed: Packed,
    index: int,
    rows: Tensor | None = None,
    copy: Tensor | None = None,
    return_copy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run one layer: attention over all tokens, then all that follows.

    Under autocast the residual stream is fp32 and GEMMs read half precision. `add_layer_norm` writes both and its
    backward pass adds the gradients of both, so that casting and adding activations need no passes of their own.

    Args:
        parts: The layer's modules and options.
        hidden: [T, H], the residual stream.
        packed: The batch.
        index: The layer's number, an RNG coordinate of its dropout.
        rows: int64 [R]; all that follows attention is computed at these tokens alone.
        copy: [T, H], `hidden` in autocast's dtype, if the layer before has written it.
        return_copy: Whether to return such a copy of the output too; autocast must be on.

    Returns:
        [T, H], or [R, H] with `rows`, in the dtype of `hidden`; with `return_copy` a pair of that and its copy.
    """
    rng = packed.rng
    dtype = copy_dtype(hidden)
    if copy is None and dtype is not None:
        copy = hidden.to(dtype)
    context = attend(parts, _gemm_input(hidden, copy, parts.query, parts.key, parts.value), packed, index)
    if rows is not None:
        context, hidden = ops.gather(rows, context, hidden)
        rng = None if rng is None else rng.at(rows)
    dropout = _dropout(rng, parts.attention_output_dropout, "attention_output", index)
    hidden, copy = _add_layer_norm(parts.attention_dense, parts.attention_norm, context, hidden, dropout, dtype)
    dense = parts.intermediate_dense
    intermediate = activate(dense, _gemm_input(hidden, copy, dense), parts.activation)
    dropout = _dropout(rng, parts.output_dropout, "output", index)
    dtype = dtype if return_copy else None
    output, copy = _add_layer_norm(parts.output_dense, parts.output_norm, intermediate, hidden, dropout, dtype)
    return output if copy is None else (output, copy)


def copy_dtype(hidden: Tensor) -> torch.dtype | None:
    """Return the dtype, autocast's, of the copy of the residual stream that GEMMs read; None: they read the stream."""
    return None if hidden.dtype == torch.float64 else autocast_dtype(hidden.device)


def attend(parts: LayerParts, hidden: Tensor, packed: Packed, index: int) -> Tensor:
    """Compute a layer's self-attention, projections included but the last: [T, H] -> [T, H]."""
    qkv = project(parts, hidden)
    arguments = attention_arguments(parts, qkv.shape[3], packed, index)
    context = ops.attention(qkv, packed.sequences, **arguments)
    if packed.query_only:
        slots = len(context) - packed.query_only
        query_only = reference.query_only_attention(qkv[slots:, 0], qkv, packed.sequences, **arguments)
        context = torch.cat([context[:slots], query_only])
    return context.flatten(1)


class AttentionArguments(TypedDict):
    """The keyword arguments of `ops.attention`, see there."""

    scale: float
    causal: bool
    window: int | None
    dropout: Dropout | None


def attention_arguments(parts: LayerParts, head_dimension: int, packed: Packed, index: int) -> AttentionArguments:
    """Return the keyword arguments of a layer's attention."""
    dropout = _dropout(packed.rng, parts.attention_dropout, "attention", index)
    scale = head_dimension**-0.5 if parts.scale is None else parts.scale
    return {"scale": scale, "causal": parts.causal, "window": None, "dropout": dropout}


def _dropout(rng: RngCoordinates | None, p: float, site: str, index: int) -> Dropout | None:
    return None if rng is None else rng.dropout(p, site, index)


def project(parts: LayerParts, hidden: Tensor) -> Tensor:
    """Compute queries, keys and values of all heads, in one GEMM where that is faster: [T, H] -> [T, 3, A, D]."""
    linears = [parts.query, parts.key, parts.value]
    plain = [linear for linear in linears if is_plain(linear)]
    if len(plain) == len(linears):
        qkv = _project_at_once(plain, hidden)
    else:
        qkv = torch.cat([linear(hidden) for linear in linears], dim=1)
    return torch.unflatten(qkv, 1, (3, parts.heads, -1))


def _project_at_once(linears: list[nn.Linear], hidden: Tensor) -> Tensor:
    """Compute three plain projections: [T, H] -> [T, 3 H]."""
    rows, columns = linears[0].weight.shape
    compiling = torch.compiler.is_compiling()
    # One tensor of three requires a copy of the weights or of the results: copy the smaller of the two. In half
    # precision three GEMMs round differently from the single one that a compiler is given.
    copy_results = not compiling and hidden.dtype == torch.float32 and len(hidden) < columns
    differentiable = torch.is_grad_enabled() or autocast_dtype(hidden.device) is not None or compiling
    if not differentiable and not matmul.uses_onednn(hidden, linears[0].weight):  # oneDNN has no `out=`
        qkv = hidden.new_empty(len(hidden), 3 * rows)
        for linear, part in zip(linears, qkv.chunk(3, dim=1), strict=True):
            torch.addmm(linear.bias, hidden, linear.weight.t(), out=part)
        return qkv
    if copy_results:
        return torch.cat([matmul.linear(hidden, linear.weight, linear.bias) for linear in linears], dim=1)
    weight = torch.cat([linear.weight for linear in linears])
    return matmul.linear(hidden, weight, torch.cat([linear.bias for linear in linears]))


def activate(dense: nn.Module, x: Tensor, activation: str) -> Tensor:
    """Compute activation(dense(x)), in one operation where it is a GELU of a plain linear layer."""
    approximate: Literal["tanh", "none"] = "tanh" if activation in _TANH_GELUS else "none"
    if activation in _PLAIN_ACTIVATIONS:
        return _PLAIN_ACTIVATIONS[activation](dense(x))
    if is_plain(dense):
        return ops.linear_gelu(x, dense.weight, dense.bias, approximate)
    return F.gelu(dense(x), approximate=approximate)


def _gemm_input(hidden: Tensor, copy: Tensor | None, *linears: nn.Module) -> Tensor:
    """Return what these linear layers read: the copy, or the stream itself where one of them is not plain."""
    return copy if copy is not None and all(map(is_plain, linears)) else hidden


def _add_layer_norm(
    dense: nn.Module,
    norm: nn.LayerNorm,
    x: Tensor,
    residual: Tensor,
    dropout: Dropout | None,
    compute_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """Return the residual stream after a projection, and its copy in `compute_dtype` if that is given."""
    projected, bias = (matmul.linear(x, dense.weight), dense.bias) if is_plain(dense) else (dense(x), None)
    output = ops.add_layer_norm(
        projected, residual, bias, norm.weight, norm.bias, norm.eps, dropout, compute_dtype=compute_dtype
    )
    return output if isinstance(output, tuple) else (output, None)
