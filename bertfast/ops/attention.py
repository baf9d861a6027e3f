"""Multi-head attention within each sequence of a packed batch (Vaswani et al., 2017, section 3.2).

Statistics and sums are at least fp32.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from bertfast.ops import attention_fallback, reference
from bertfast.ops.arguments import Arguments
from bertfast.ops.dispatch import Implementation, operator, resolve, run
from bertfast.ops.double_backward import must_be_differentiable, reference_gradients
from bertfast.ops.dropout import Dropout, as_dropout, from_kernel_arguments, kernel_arguments
from bertfast.ops.sequences import Sequences, require

HEAD_DIMENSIONS = (32, 64, 128)
"""Head dimensions that the kernels support."""

_ARGUMENTS = Arguments(
    "attention", qkv="floating [tokens, 3, heads, head_dimension]", cu_seqlens="integer [sequences + 1]"
)


def attention(
    qkv: Tensor,
    sequences: Sequences | Tensor | list[int] | tuple[int, ...],
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
    dropout: Dropout | float | None = None,
    implementation: Implementation | None = None,
) -> Tensor:
    """Return dropout(softmax(Q K^T · scale)) V of each sequence.

    Args:
        qkv: [T, 3, A, D], floating point: queries, keys and values.
        sequences: Which of the T slots belong to which sequence: `Sequences`; or `cu_seqlens`, int [S + 1], as in other
            variable-length attention; or a list of lengths. The last two must cover all T slots. With a `cu_seqlens`
            on a GPU, the kernels are configured for one sequence of T tokens; `Sequences` has a tighter bound.
        scale: Factor of the attention scores; None: 1 / sqrt(D).
        causal: Position i attends only to positions up to i.
        window: Position i attends only to positions at most this far away; None: no limit.
        dropout: Dropout on the attention probabilities (fewer than 256 heads). A float draws a seed from torch.
        implementation: Default: the fastest one that supports the arguments.

    Returns:
        [T, A, D] in qkv's dtype; zero, like the gradient, at slots that belong to no sequence.

    Raises:
        TypeError: An argument has an unsupported type or dtype.
        ValueError: Shapes, devices or options do not match, or `implementation` does not support the arguments.
    """
    if not isinstance(sequences, Sequences):
        sequences = _whole_sequences(sequences, qkv)
    packed = sequences
    dropout = as_dropout("attention", dropout, lambda: (packed.token_sequence_ids, packed.position), qkv)
    _ARGUMENTS.check(qkv, packed.cu_seqlens, dropout=dropout)
    if len(qkv) != packed.capacity:
        raise ValueError(f"attention: qkv holds {len(qkv)} tokens, the sequences are packed into {packed.capacity}")
    if dropout is not None and qkv.shape[2] >= 256:
        raise ValueError(f"attention: dropout requires fewer than 256 heads, got {qkv.shape[2]}")
    if window is not None and not isinstance(window, (int, torch.SymInt)):
        raise TypeError(f"attention: window must be an integer or None, got {type(window).__name__}")
    if window is not None and window < 0:
        raise ValueError(f"attention: window must not be negative, got {window}")
    if scale is None:
        scale = 1 / math.sqrt(qkv.shape[3])
    elif not isinstance(scale, Real):  # a tensor would get no gradient
        raise TypeError(f"attention: scale must be a number, got {type(scale).__name__}: multiply the queries by it")
    requested = implementation
    implementation = resolve("attention", requested, qkv, _unsupported_reason(qkv, scale))
    if implementation == "reference":  # by default, a fallback that computes the same in less memory
        compute = reference.attention if requested == "reference" else attention_fallback.attention
        return compute(qkv, packed, scale, causal, window, dropout)
    seed, _, _, *mask = kernel_arguments(dropout)
    table = _work_table(implementation, packed)
    options = (packed.max_seqlen_bound, scale, causal, window)
    o: Tensor = run(
        Attention, implementation, qkv, packed.cu_seqlens, packed.sequence_ids, table, *options, seed, *mask
    )
    return o


def _whole_sequences(sequences: Tensor | list[int] | tuple[int, ...], qkv: Tensor) -> Sequences:
    """Return the sequences of `cu_seqlens` or of lengths, which cover all tokens of qkv."""
    if not isinstance(qkv, Tensor):
        raise TypeError(f"attention: qkv must be a tensor, got {type(qkv).__name__}")
    if qkv.dim() != 4:
        raise ValueError(f"attention: qkv must have shape [tokens, 3, heads, head_dimension], got {list(qkv.shape)}")
    if not isinstance(sequences, (Tensor, list, tuple)):
        raise TypeError(
            "attention: sequences must be a bertfast.ops.sequences.Sequences (see Sequences.from_lengths), an integer "
            f"tensor cu_seqlens of shape [sequences + 1] or a list of lengths, got {type(sequences).__name__}"
        )
    try:
        if isinstance(sequences, Tensor):
            result = Sequences.from_cu_seqlens(sequences, capacity=len(qkv))
        else:
            result = Sequences.from_lengths(sequences, capacity=len(qkv), device=qkv.device)
    except ValueError as error:
        raise ValueError(f"attention: {error}; a tensor must be cu_seqlens, a list must be lengths") from None
    end = result.cu_seqlens[-1]
    rule = f"attention: the sequences must cover all {len(qkv)} tokens of qkv (pass Sequences if some are padding)"
    require(end == len(qkv), rule, lambda: end)
    return result


def _work_table(implementation: Implementation, sequences: Sequences) -> Tensor | None:
    """Return the table from which kernels on a GPU take their work."""
    if implementation == "triton":
        return sequences.tile_table
    return sequences.sequence_table if implementation == "cuda" else None


def _unsupported_reason(qkv: Tensor, scale: float) -> str | None:
    if qkv.shape[3] not in HEAD_DIMENSIONS:
        return f"its kernels support head dimensions of 32, 64 and 128, qkv has {qkv.shape[3]}"
    return None if scale > 0 else f"its kernels require a positive scale, got {scale}"


class Attention(torch.autograd.Function):
    """The kernels as a differentiable operation: the log-sum-exp of the scores is saved, all else recomputed."""

    @staticmethod
    def forward(
        ctx: Any, implementation: Implementation, qkv: Tensor, cu_seqlens: Tensor, sequence_ids: Tensor,
        tile_table: Tensor | None, *arguments: Any,
    ) -> Tensor:  # fmt: skip
        *options, seed, counter_word, threshold = arguments
        ctx.implementation, ctx.options, ctx.rng = implementation, options, (counter_word, threshold)
        forward = operator(implementation, "attention_forward")
        o: Tensor
        o, lse = forward(qkv, cu_seqlens, sequence_ids, tile_table, *options, seed, *ctx.rng)
        ctx.save_for_backward(qkv, o, lse, cu_seqlens, sequence_ids, tile_table, seed)
        return o

    @staticmethod
    def backward(ctx: Any, d_o: Tensor) -> tuple[Tensor | None, ...]:
        *saved, seed = ctx.saved_tensors
        if must_be_differentiable():
            qkv, _, _, cu_seqlens, sequence_ids, _ = saved
            max_seqlen_bound, scale, causal, window = ctx.options
            sequences = Sequences(cu_seqlens, sequence_ids, len(qkv), max_seqlen_bound)
            coordinates = sequences.token_sequence_ids, sequences.position
            dropout = from_kernel_arguments(seed, *coordinates, *ctx.rng)

            def definition(qkv: Tensor) -> Tensor:
                return attention_fallback.attention(qkv, sequences, scale, causal, window, dropout)

            return None, *reference_gradients(definition, [qkv], [True], [d_o]), *[None] * 10
        backward = operator(ctx.implementation, "attention_backward")
        return None, backward(d_o, *saved, *ctx.options, seed, *ctx.rng), *[None] * 10
