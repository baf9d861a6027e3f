"""The contract of each operation: its schema, and the shapes, dtypes and devices of its results.

One function per operation. Its parameters are the schema of `torch.ops.bertfast.<implementation>_<name>`; its body is
the fake implementation, which `torch.compile` and fake tensors run to infer the results, and with which Triton's
operators allocate them. The operators of Triton and of the native library are all defined from these functions.

Sizes are read from `shape`, which keeps them symbolic; `len` would return Python numbers. Shared parameters:

    seed, sequence_ids, positions    RNG coordinates of dropout, int64 [], int [T] and int [T] (`ops/dropout.py`);
    counter_word, threshold          without a seed there is no dropout
    mean, rstd                       statistics of LayerNorm, fp32 [rows]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Contract:
    """Schema and fake implementation of an operation, common to all its implementations.

    Attributes:
        schema: Schema in PyTorch's notation, without the name.
        fake: Takes the operation's arguments and returns uninitialised tensors like its results.
    """

    schema: str
    fake: Callable[..., Any]


CONTRACTS: dict[str, Contract] = {}
"""All contracts by the name of their operation."""


def contract(function: Callable[..., Any] | None = None, *, mutates: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Enter the decorated function as the contract of the operation of its name, which writes into `mutates`."""
    if function is None:
        return lambda function: contract(function, mutates=mutates)
    schema = torch.library.infer_schema(function, mutates_args=mutates)
    CONTRACTS[function.__name__] = Contract(schema, function)
    return function


@contract
def add_layer_norm_forward(
    x: Tensor,
    residual: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor | None,
    eps: float,
    seed: Tensor | None,
    sequence_ids: Tensor | None,
    positions: Tensor | None,
    counter_word: int,
    threshold: int,
    copy_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y [T, H] in residual's dtype, mean, rstd, and y in `copy_dtype`, empty without that."""
    statistics = x.new_empty(x.shape[0], dtype=torch.float32)
    copy = residual.new_empty((0, 0) if copy_dtype is None else x.shape, dtype=copy_dtype)
    return residual.new_empty(x.shape), statistics, torch.empty_like(statistics), copy


@contract
def add_layer_norm_backward(
    d_y: Tensor,
    x: Tensor,
    residual: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    sequence_ids: Tensor | None,
    positions: Tensor | None,
    counter_word: int,
    threshold: int,
    d_copy: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return d_x, empty if it equals d_residual; d_residual; fp32 [3, H] of d_gamma, d_beta and d_bias."""
    shared = seed is None and x.dtype == residual.dtype
    d_x = x.new_empty((0, 0) if shared else x.shape)
    return d_x, residual.new_empty(x.shape), x.new_empty((3, x.shape[1]), dtype=torch.float32)


@contract
def attention_forward(
    qkv: Tensor,
    cu_seqlens: Tensor,
    sequence_ids: Tensor,
    tile_table: Tensor | None,
    max_seqlen_bound: int,
    scale: float,
    causal: bool,
    window: int | None,
    seed: Tensor | None,
    counter_word: int,
    threshold: int,
) -> tuple[Tensor, Tensor]:
    """Return o [T, A, D] and the log-sum-exp of the scores, fp32 [A, T].

    `sequence_ids` is int64 [S] here. `tile_table` is that of `Sequences`; for CUDA C++, its `sequence_table` or None.
    """
    tokens, _, heads, head_dimension = qkv.shape
    return qkv.new_empty((tokens, heads, head_dimension)), qkv.new_empty((heads, tokens), dtype=torch.float32)


@contract
def attention_backward(
    d_o: Tensor,
    qkv: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    sequence_ids: Tensor,
    tile_table: Tensor | None,
    max_seqlen_bound: int,
    scale: float,
    causal: bool,
    window: int | None,
    seed: Tensor | None,
    counter_word: int,
    threshold: int,
) -> Tensor:
    """Return d_qkv [T, 3, A, D]."""
    return qkv.new_empty(qkv.shape)


@contract
def bias_gelu_forward(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    """Return y [T, H] in x's dtype; `approximate` is "none" or "tanh"."""
    return x.new_empty(x.shape)


@contract
def bias_gelu_backward(d_y: Tensor, x: Tensor, bias: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """Return d_x [T, H] in x's dtype and d_bias, fp32 [H]."""
    return x.new_empty(x.shape), x.new_empty(x.shape[1:], dtype=torch.float32)


@contract(mutates=("logits", "losses", "correct", "d_bias"))
def cross_entropy(
    logits: Tensor, bias: Tensor, labels: Tensor, losses: Tensor, correct: Tensor, d_bias: Tensor
) -> None:
    """Compute losses, and replace logits by their gradient: the library's kernel in `linear_cross_entropy_forward`."""


@contract
def embeddings_forward(
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    token_ids: Tensor | None,
    token_type_ids: Tensor,
    position_ids: Tensor,
    gamma: Tensor,
    beta: Tensor | None,
    eps: float,
    seed: Tensor | None,
    sequence_ids: Tensor | None,
    positions: Tensor | None,
    counter_word: int,
    threshold: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [T, H] in word's dtype, mean and rstd."""
    (tokens,) = token_type_ids.shape
    statistics = word.new_empty(tokens, dtype=torch.float32)
    return word.new_empty((tokens, word.shape[1])), statistics, torch.empty_like(statistics)


@contract
def embeddings_backward(
    d_y: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    token_ids: Tensor | None,
    token_type_ids: Tensor,
    position_ids: Tensor,
    gamma: Tensor,
    mean: Tensor,
    rstd: Tensor,
    padding_index: int | None,
    seed: Tensor | None,
    sequence_ids: Tensor | None,
    positions: Tensor | None,
    counter_word: int,
    threshold: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return d_word with row `padding_index` zero; d_position; d_token_type; fp32 [2, H] of d_gamma and d_beta."""
    d_word, d_position, d_token_type = (table.new_empty(table.shape) for table in (word, position, token_type))
    return d_word, d_position, d_token_type, word.new_empty((2, word.shape[1]), dtype=torch.float32)


@contract
def gated_activation_forward(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Return y [T, I] in x's dtype; x is [T, 2 I], and `activation` is "gelu", "gelu_tanh" or "silu"."""
    return x.new_empty((x.shape[0], x.shape[1] // 2))


@contract
def gated_activation_backward(d_y: Tensor, x: Tensor, bias: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    """Return d_x [T, 2 I] in x's dtype and d_bias, fp32 [2 I], empty without a bias."""
    return x.new_empty(x.shape), x.new_empty(0 if bias is None else x.shape[1], dtype=torch.float32)


@contract
def gather_backward(rows: Tensor, d_ys: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """Return the gradient [tokens, H] of x for each d_y [R, H] of y = x[rows]."""
    return [d_y.new_empty((tokens, d_y.shape[1])) for d_y in d_ys]


@contract
def gelu_layer_norm_forward(
    x: Tensor, bias: Tensor | None, gamma: Tensor, beta: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [R, H] in gamma's dtype, mean and rstd."""
    statistics = x.new_empty(x.shape[0], dtype=torch.float32)
    return gamma.new_empty(x.shape), statistics, torch.empty_like(statistics)


@contract
def gelu_layer_norm_backward(
    d_y: Tensor, x: Tensor, bias: Tensor | None, gamma: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Return d_x [R, H] in x's dtype and fp32 [3, H] of d_gamma, d_beta and d_bias."""
    return x.new_empty(x.shape), x.new_empty((3, x.shape[1]), dtype=torch.float32)


@contract
def linear_gelu_forward(x: Tensor, weight: Tensor, bias: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """Return y and x W^T, both [T, N]; x and weight are of one dtype."""
    y = x.new_empty((x.shape[0], weight.shape[0]))
    return y, torch.empty_like(y)


@contract
def linear_cross_entropy_forward(
    hidden: Tensor,
    rows: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    needs_grad: Sequence[bool],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss, fp32 []; correct, counted, int64 []; gradients of hidden, weight, bias; empty if not needed."""
    loss, correct = hidden.new_empty((), dtype=torch.float32), labels.new_empty((), dtype=torch.int64)
    d_hidden, d_weight, d_bias = (
        x.new_empty(x.shape if needed else 0) for x, needed in zip((hidden, weight, bias), needs_grad, strict=True)
    )
    return loss, correct, torch.empty_like(correct), d_hidden, d_weight, d_bias


@contract
def packed_layer_forward(
    hidden: Tensor,
    cu_seqlens: Tensor,
    weights: Sequence[Tensor],
    norms: Sequence[Tensor],
    epsilons: Sequence[float],
    heads: int,
    head_dimension: int,
    intermediate: int,
    scale: float,
    causal: bool,
    window: int | None,
    activation: str,
    attention_dtype: torch.dtype,
    rows: Tensor | None,
) -> Tensor:
    """Return the output [T, H], or [R, H] with `rows`, of a post-norm layer, in hidden's dtype.

    `weights` are the five tensors of each of four packed weights: of queries, keys and values, of attention's output,
    and of the feed-forward layer. `norms` are gamma and beta of two norms, `epsilons` their ε.
    """
    return hidden.new_empty((hidden.shape[0] if rows is None else rows.shape[0], hidden.shape[1]))


@contract
def packed_linear_forward(
    x: Tensor, weight: Sequence[Tensor], columns: int, activation: str, dtype: torch.dtype
) -> Tensor:
    """Return y [T, `columns`] in `dtype`; `weight` is operands, scales, sums, factors and bias, empty if absent."""
    return x.new_empty((x.shape[0], columns), dtype=dtype)


@contract
def pre_norm_forward(
    residual: Tensor,
    x: Tensor | None,
    bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor | None,
    eps: float,
    rms: bool,
    norm_dtype: torch.dtype,
    seed: Tensor | None,
    sequence_ids: Tensor | None,
    positions: Tensor | None,
    counter_word: int,
    threshold: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the stream [T, H] in residual's dtype, empty without x; its norm in `norm_dtype`; mean, rstd.

    With `rms` the norm is an RMSNorm, whose mean is empty.
    """
    (tokens, hidden), statistics = residual.shape, residual.new_empty(residual.shape[0], dtype=torch.float32)
    stream = residual.new_empty((0, 0) if x is None else (tokens, hidden))
    mean = residual.new_empty(0, dtype=torch.float32) if rms else torch.empty_like(statistics)
    return stream, residual.new_empty((tokens, hidden), dtype=norm_dtype), mean, statistics


@contract
def pre_norm_backward(
    stream: Tensor,
    d_stream: Tensor | None,
    d_normed: Tensor | None,
    gamma: Tensor,
    mean: Tensor,
    rstd: Tensor,
    rms: bool,
    has_bias: bool,
    x_dtype: torch.dtype | None,
    seed: Tensor | None,
    sequence_ids: Tensor | None,
    positions: Tensor | None,
    counter_word: int,
    threshold: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return d_x in `x_dtype`, empty if that is None or d_x equals d_residual; d_residual; the parameters' gradients.

    These are fp32 [3, H]: d_gamma, d_beta and d_bias. The gradients of the outputs may be absent.
    """
    shared = x_dtype is None or (seed is None and x_dtype == stream.dtype)
    d_x = stream.new_empty((0, 0) if shared else stream.shape, dtype=x_dtype)
    return d_x, stream.new_empty(stream.shape), stream.new_empty((3, stream.shape[1]), dtype=torch.float32)


@contract
def rotary_forward(qkv: Tensor, table: Tensor) -> Tensor:
    """Return y [T, 3, A, D] in qkv's dtype; `table` is fp32."""
    return qkv.new_empty(qkv.shape)


@contract
def rotary_backward(d_y: Tensor, table: Tensor) -> Tensor:
    """Return d_qkv [T, 3, A, D]."""
    return d_y.new_empty(d_y.shape)
