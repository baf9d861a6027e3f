"""BERT's input: the normalised sum of three embeddings (Devlin et al., 2019, section 3, figure 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bertfast.ops import reference
from bertfast.ops.arguments import Arguments
from bertfast.ops.dispatch import Implementation, cast_sums, dtypes_reason, operator, resolve, run
from bertfast.ops.double_backward import must_be_differentiable, reference_gradients
from bertfast.ops.dropout import Dropout, as_dropout, from_kernel_arguments, kernel_arguments, row_coordinates
from bertfast.ops.index_checks import check_below

_ROWS = {
    "position": "floating [positions, hidden]",
    "token_type": "floating [types, hidden]",
    "gamma": "floating [hidden]",
    "beta": "optional floating [hidden]",
}
_IDS = {"token_type_ids": "integer [tokens]", "position_ids": "integer [tokens]"}
_ARGUMENTS = Arguments(
    "embeddings", token_ids="integer [tokens]", **_IDS, word="floating [vocab_size, hidden]", **_ROWS
)
_EMBEDDED_ARGUMENTS = Arguments("embeddings", **_IDS, word="floating [tokens, hidden]", **_ROWS)


def embeddings(
    token_ids: Tensor | None,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    gamma: Tensor,
    beta: Tensor | None,
    eps: float,
    dropout: Dropout | float | None = None,
    *,
    padding_index: int | None = None,
    implementation: Implementation | None = None,
) -> Tensor:
    """Return dropout(LN(word[token_ids] + token_type[token_type_ids] + position[position_ids])).

    Args:
        token_ids: int [T]; None if `word` holds the embedded tokens [T, H].
        token_type_ids: int [T].
        position_ids: int [T].
        word: [V, H], floating point.
        position: [positions, H], floating point.
        token_type: [types, H], floating point.
        gamma: [H], weight of the LayerNorm.
        beta: [H], bias of the LayerNorm; None: no bias.
        eps: ε of the LayerNorm, used in fp32.
        dropout: Dropout on the output. A float draws a seed from torch's generator; None: no dropout.
        padding_index: Row of `word` that gets no gradient, as in `torch.nn.Embedding`.
        implementation: Default: the fastest one that supports the arguments.

    Returns:
        [T, H] in word's dtype.

    Raises:
        TypeError: An argument has an unsupported dtype.
        ValueError: Shapes or devices do not match, or `implementation` does not support the arguments.
        IndexError: On a CPU, an index is not in its table. On a GPU this is not checked: the host would have to wait.
    """
    dropout = as_dropout("embeddings", dropout, lambda: row_coordinates(token_type_ids), token_type_ids)
    tensors = (token_type_ids, position_ids, word, position, token_type, gamma, beta)
    if token_ids is None:
        _EMBEDDED_ARGUMENTS.check(*tensors, dropout=dropout)
    else:
        _ARGUMENTS.check(token_ids, *tensors, dropout=dropout)
    implementation = resolve("embeddings", implementation, word, dtypes_reason(implementation, word, *tensors[3:]))
    if implementation == "reference":
        _check_indices(token_ids, token_type_ids, position_ids, word, position, token_type)
        return reference.embeddings(token_ids, *tensors, eps, dropout, padding_index)
    try:
        y: Tensor = run(Embeddings, implementation, token_ids, *tensors, eps, padding_index, *kernel_arguments(dropout))
        return y
    except RuntimeError as error:
        failure = error
    # The native library checks indices as it reads them, since a separate check would double the time of a short
    # call. It raises RuntimeError; this check raises IndexError.
    if implementation == "cpu":
        _check_indices(token_ids, token_type_ids, position_ids, word, position, token_type)
    raise failure


def _check_indices(
    token_ids: Tensor | None,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
) -> None:
    if token_ids is not None:
        check_below("embeddings", "token_ids", token_ids, len(word), "the vocabulary")
    check_below("embeddings", "token_type_ids", token_type_ids, len(token_type), "the token-type table")
    check_below("embeddings", "position_ids", position_ids, len(position), "the position table")


class Embeddings(torch.autograd.Function):
    """The kernels as a differentiable operation; the backward pass recomputes the dropout mask."""

    @staticmethod
    def forward(
        ctx: Any, implementation: Implementation, token_ids: Tensor | None, token_type_ids: Tensor,
        position_ids: Tensor, word: Tensor, position: Tensor, token_type: Tensor, gamma: Tensor,
        beta: Tensor | None, eps: float, padding_index: int | None, *dropout: Any,
    ) -> Tensor:  # fmt: skip
        inputs = (word, position, token_type, token_ids, token_type_ids, position_ids, gamma)
        ctx.implementation = implementation
        y: Tensor
        y, mean, rstd = operator(implementation, "embeddings_forward")(*inputs, beta, eps, *dropout)
        *coordinates, ctx.counter_word, ctx.threshold = dropout
        ctx.padding_index, ctx.eps = padding_index, eps
        ctx.save_for_backward(*inputs, beta, mean, rstd, *coordinates)
        return y

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, gamma, beta, mean, rstd, seed, sequence_ids, positions = ctx.saved_tensors
        rng = (seed, sequence_ids, positions, ctx.counter_word, ctx.threshold)
        if must_be_differentiable():
            *tables, token_ids, token_type_ids, position_ids = inputs
            ids = token_ids, token_type_ids, position_ids
            dropout = from_kernel_arguments(*rng)

            def definition(
                word: Tensor, position: Tensor, token_type: Tensor, gamma: Tensor, beta: Tensor | None
            ) -> Tensor:
                tables = word, position, token_type
                return reference.embeddings(*ids, *tables, gamma, beta, ctx.eps, dropout, ctx.padding_index)

            needs_grad = ctx.needs_input_grad[4:9]
            gradients = reference_gradients(definition, (*tables, gamma, beta), needs_grad, [d_y])
            return *[None] * 4, *gradients, *[None] * 7
        *d_tables, sums = operator(ctx.implementation, "embeddings_backward")(
            d_y, *inputs, gamma, mean, rstd, ctx.padding_index, *rng
        )
        return *[None] * 4, *d_tables, *cast_sums(sums, gamma, beta), *[None] * 7
