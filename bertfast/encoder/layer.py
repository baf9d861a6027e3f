"""One transformer layer as a function on packed tokens, for any model family.

Post-norm layers are those of BERT (Devlin et al., 2019), pre-norm layers those of ModernBERT (Warner et al., 2024).
T tokens, R gathered rows, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bertfast import ops
from bertfast.encoder.attention import attend
from bertfast.encoder.feed_forward import intermediate
from bertfast.encoder.linear import is_plain
from bertfast.encoder.norm import add_norm, add_pre_norm, normalise, project
from bertfast.encoder.parts import LayerParts
from bertfast.encoder.unpadding import Packed
from bertfast.ops.dropout import Dropout, RngCoordinates
from bertfast.ops.reference_parts import drop_hidden
from bertfast.runtime.torch_compat import autocast_dtype


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

    Under autocast the residual stream is fp32 and GEMMs read half precision. The norms of a post-norm layer write both
    and their backward pass adds the gradients of both, so that casting and adding activations need no passes of their
    own.

    Args:
        parts: The layer's modules and options.
        hidden: [T, H], the residual stream.
        packed: The batch.
        index: The layer's number, an RNG coordinate of its dropout.
        rows: int64 [R]; all that follows attention is computed at these tokens alone.
        copy: [T, H], `hidden` in autocast's dtype, if the layer before has written it.
        return_copy: Whether to return such a copy of the output too; autocast must be on, and the layer post-norm.

    Returns:
        [T, H], or [R, H] with `rows`, in the dtype of `hidden`; with `return_copy` a pair of that and its copy.
    """
    if parts.pre_norm:
        return _pre_norm_layer(parts, hidden, packed, index, rows)
    dtype = copy_dtype(hidden)
    if copy is None and dtype is not None:
        copy = hidden.to(dtype)
    context = attend(parts, _gemm_input(hidden, copy, *parts.qkv), packed, index)
    context, hidden, rng = _at_rows(rows, context, hidden, packed.rng)
    dropout = _dropout(rng, parts.attention_output_dropout, "attention_output", index)
    hidden, copy = add_norm(parts.attention_dense, parts.attention_norm, context, hidden, dropout, dtype)
    activated = intermediate(parts, _gemm_input(hidden, copy, *parts.intermediate))
    dropout = _dropout(rng, parts.output_dropout, "output", index)
    dtype = dtype if return_copy else None
    output, copy = add_norm(parts.output_dense, parts.output_norm, activated, hidden, dropout, dtype)
    return output if copy is None else (output, copy)


def _pre_norm_layer(parts: LayerParts, hidden: Tensor, packed: Packed, index: int, rows: Tensor | None) -> Tensor:
    """Run a layer whose halves each normalise their input and add their output to the residual stream."""
    dtype = copy_dtype(hidden)
    normed = normalise(parts.attention_norm, hidden, dtype)
    context = attend(parts, normed, packed, index)
    context, hidden, rng = _at_rows(rows, context, hidden, packed.rng)
    dropout = _dropout(rng, parts.attention_output_dropout, "attention_output", index)
    hidden, normed = add_pre_norm(parts.attention_dense, parts.output_norm, context, hidden, dropout, dtype)
    activated = intermediate(parts, normed)
    activated = drop_hidden(activated, _dropout(rng, parts.intermediate_dropout, "intermediate", index))
    projected, bias = project(parts.output_dense, activated)
    output = drop_hidden(
        projected if bias is None else projected + bias, _dropout(rng, parts.output_dropout, "output", index)
    )
    return hidden + output.to(hidden.dtype)


def copy_dtype(hidden: Tensor) -> torch.dtype | None:
    """Return the dtype, autocast's, of the copy of the residual stream that GEMMs read; None: they read the stream."""
    return None if hidden.dtype == torch.float64 else autocast_dtype(hidden.device)


def _at_rows(
    rows: Tensor | None, context: Tensor, hidden: Tensor, rng: RngCoordinates | None
) -> tuple[Tensor, Tensor, RngCoordinates | None]:
    """Return the attention's output, the residual stream and the RNG coordinates at `rows`; None: at all tokens."""
    if rows is None:
        return context, hidden, rng
    if context.shape[1] == hidden.shape[1]:
        context, hidden = ops.gather(rows, context, hidden)
    else:  # the heads together are wider or narrower than the stream
        (context,), (hidden,) = ops.gather(rows, context), ops.gather(rows, hidden)
    return context, hidden, None if rng is None else rng.at(rows)


def _dropout(rng: RngCoordinates | None, p: float, site: str, index: int) -> Dropout | None:
    return None if rng is None else rng.dropout(p, site, index)


def _gemm_input(hidden: Tensor, copy: Tensor | None, *linears: nn.Module) -> Tensor:
    """Return what these linear layers read: the copy, or the stream itself where one of them is not plain."""
    return copy if copy is not None and all(map(is_plain, linears)) else hidden
