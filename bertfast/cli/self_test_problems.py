"""The inputs of `bertfast doctor --check`: each operator at BERT's shapes, on random values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bertfast import ops
from bertfast.ops.attention import HEAD_DIMENSIONS
from bertfast.ops.dispatch import Implementation
from bertfast.ops.dropout import Dropout, RngCoordinates
from bertfast.ops.gated_activation import Activation
from bertfast.ops.reference import IGNORE_INDEX
from bertfast.ops.sequences import Sequences

EPS = 1e-12  # of LayerNorm
DROPOUT = 0.1
MASKED = 0.15  # share of the tokens that have a label
HIDDEN = 768


@dataclass(frozen=True, eq=False)
class Problem:
    """An operator on inputs of one shape.

    Attributes:
        operator: Name in `bertfast.ops`.
        shape: Shape and options, such as "4x512 D=64 dropout": 4 sequences of 512 tokens, head dimension 64.
        device: Device of the inputs.
        shapes: The shape of each differentiable input, by name.
        call: Function (implementation, *inputs) that runs the operator and returns its differentiable outputs, of any
            dtypes.
    """

    operator: str
    shape: str
    device: torch.device
    shapes: dict[str, tuple[int, ...]]
    call: Callable[..., Tensor | tuple[Tensor, ...]]

    @cached_property
    def inputs(self) -> list[Tensor]:
        """Return normally distributed float64 inputs, equal in every process; GEMM weights keep outputs of order 1."""
        generator = torch.Generator().manual_seed(0)
        values = []
        for name, shape in self.shapes.items():
            value = torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if name == "weight" else 1)
            values.append(value.to(self.device, torch.float64))
        return values


def problems(device: torch.device) -> list[Problem]:
    """Return every operator at BERT's shapes, the most informative problems first.

    GPUs get 2,048 tokens of 768 columns and BERT's vocabulary. CPUs get less, so that all checks take less than a
    minute on two cores; their vocabulary leaves the same remainder for every vector width as BERT's.
    """
    lengths = {128: [128] * 16, 512: [512] * 4} if device.type == "cuda" else {128: [128] * 2, 512: [512]}
    heads_width, vocab_size = (HIDDEN, 30522) if device.type == "cuda" else (256, 4090)
    batches = [Sequences.from_lengths(batch_lengths, device=device) for batch_lengths in lengths.values()]
    shapes = [f"{len(batch_lengths)}x{length}" for length, batch_lengths in lengths.items()]
    result = []
    for dimension in sorted(HEAD_DIMENSIONS, key=(64, 32, 128).index):
        for dropout in (True, False):
            result += [
                _attention(shape, batch, heads_width // dimension, dimension, dropout)
                for shape, batch in zip(shapes, batches, strict=True)
            ]
        if dimension == 64:  # before the other head dimensions
            result += _row_problems(shapes[-1], batches[-1], vocab_size)
    return result


def _row_problems(shape: str, batch: Sequences, vocab_size: int) -> list[Problem]:
    tokens = len(batch.position)
    rows = max(round(MASKED * tokens), 1)
    return [
        _add_layer_norm(shape, batch, dropout=True),
        _bias_gelu(shape, tokens, batch.position.device),
        _embed(shape, batch, vocab_size),
        _linear_cross_entropy(tokens, rows, vocab_size, batch.position.device),
        _gelu_layer_norm(rows, batch.position.device),
        _linear_gelu(shape, tokens, batch.position.device),
        _pre_norm(shape, batch, rms=False),
        _gated_activation(shape, tokens, "gelu", batch.position.device),
        _pre_norm(shape, batch, rms=True),
        _gated_activation(shape, tokens, "silu", batch.position.device),
        _add_layer_norm(shape, batch, dropout=False),
        _add_layer_norm_with_copy(shape, batch),
        _gather(tokens, rows, batch.position.device),
        _rotary(shape, batch),
    ]


def _integers(device: torch.device, bound: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(bound)
    return torch.randint(bound, (size,), generator=generator).to(device)


def _dropout(batch: Sequences, site: str, layer: int | None) -> Dropout | None:
    seed = torch.tensor(0x0123_4567_89AB_CDEF, device=batch.position.device)
    return RngCoordinates(seed, batch.token_sequence_ids, batch.position).dropout(DROPOUT, site, layer)


def _attention(shape: str, batch: Sequences, heads: int, dimension: int, dropout: bool) -> Problem:
    mask = _dropout(batch, "attention", 0) if dropout else None
    return Problem(
        "attention",
        f"{shape} D={dimension}" + " dropout" * dropout,
        batch.position.device,
        {"qkv": (len(batch.position), 3, heads, dimension)},
        lambda implementation, qkv: ops.attention(qkv, batch, dropout=mask, implementation=implementation),
    )


def _add_layer_norm(shape: str, batch: Sequences, dropout: bool) -> Problem:
    mask = _dropout(batch, "output", 0) if dropout else None
    rows, vector = (len(batch.position), HIDDEN), (HIDDEN,)
    return Problem(
        "add_layer_norm",
        f"{shape} H={HIDDEN}" + " dropout" * dropout,
        batch.position.device,
        {"x": rows, "residual": rows, "bias": vector, "gamma": vector, "beta": vector},
        lambda implementation, x, residual, bias, gamma, beta: ops.add_layer_norm(
            x, residual, bias, gamma, beta, EPS, mask, implementation=implementation
        ),
    )


def _add_layer_norm_with_copy(shape: str, batch: Sequences) -> Problem:
    """Call it as a layer does under autocast: an output and its copy for the next GEMM, with gradients of both."""
    rows, vector = (len(batch.position), HIDDEN), (HIDDEN,)

    def call(
        implementation: Implementation, x: Tensor, residual: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        half = torch.float16 if x.dtype == torch.float16 else torch.bfloat16
        copy_dtype = x.dtype if x.dtype == torch.float64 else half  # the reference is not rounded
        return ops.add_layer_norm(
            x, residual, bias, gamma, beta, EPS, compute_dtype=copy_dtype, implementation=implementation
        )

    return Problem(
        "add_layer_norm",
        f"{shape} H={HIDDEN} copy",
        batch.position.device,
        {"x": rows, "residual": rows, "bias": vector, "gamma": vector, "beta": vector},
        call,
    )


def _pre_norm(shape: str, batch: Sequences, rms: bool) -> Problem:
    """Call it as an RMSNorm without dropout and biases, as EuroBERT does, or as a LayerNorm with all of them."""
    mask = None if rms else _dropout(batch, "output", 0)
    rows, vector = (len(batch.position), HIDDEN), (HIDDEN,)

    def call(
        implementation: Implementation, x: Tensor, residual: Tensor, gamma: Tensor, *biases: Tensor
    ) -> tuple[Tensor, Tensor]:
        bias, beta = biases if biases else (None, None)
        return ops.pre_norm(x, residual, bias, gamma, beta, EPS, mask, rms=rms, implementation=implementation)

    return Problem(
        "pre_norm",
        f"{shape} H={HIDDEN} {'rms' if rms else 'dropout'}",
        batch.position.device,
        {"x": rows, "residual": rows, "gamma": vector} | ({} if rms else {"bias": vector, "beta": vector}),
        call,
    )


def _gated_activation(shape: str, tokens: int, activation: Activation, device: torch.device) -> Problem:
    columns = 3 * HIDDEN  # two halves of 1,152, as in ModernBERT
    return Problem(
        "gated_activation",
        f"{shape} I={columns // 2} {activation}",
        device,
        {"x": (tokens, columns), "bias": (columns,)},
        lambda implementation, x, bias: ops.gated_activation(x, activation, bias, implementation=implementation),
    )


def _gather(tokens: int, rows: int, device: torch.device) -> Problem:
    selected = _integers(device, tokens, rows)  # repeated rows occur
    return Problem(
        "gather",
        f"{rows} of {tokens} H={HIDDEN}",
        device,
        {"x": (tokens, HIDDEN)},
        lambda implementation, x: ops.gather(selected, x, implementation=implementation)[0],
    )


def _rotary(shape: str, batch: Sequences) -> Problem:
    heads, dimension, device = HIDDEN // 64, 64, batch.position.device
    inv_freq = 10_000 ** -(torch.arange(0, dimension, 2, device=device) / dimension)
    angles = batch.position[:, None] * inv_freq
    table = torch.cat([angles.cos(), angles.sin()], 1)
    return Problem(
        "rotary",
        f"{shape} D={dimension}",
        device,
        {"qkv": (len(batch.position), 3, heads, dimension)},
        lambda implementation, qkv: ops.rotary(qkv, table, implementation=implementation),
    )


def _bias_gelu(shape: str, tokens: int, device: torch.device) -> Problem:
    return Problem(
        "bias_gelu",
        f"{shape} H={4 * HIDDEN}",
        device,
        {"x": (tokens, 4 * HIDDEN), "bias": (4 * HIDDEN,)},
        lambda implementation, x, bias: ops.bias_gelu(x, bias, implementation=implementation),
    )


def _linear_gelu(shape: str, tokens: int, device: torch.device) -> Problem:
    return Problem(
        "linear_gelu",
        f"{shape} H={HIDDEN}",
        device,
        {"x": (tokens, HIDDEN), "weight": (4 * HIDDEN, HIDDEN), "bias": (4 * HIDDEN,)},
        lambda implementation, x, weight, bias: ops.linear_gelu(x, weight, bias, implementation=implementation),
    )


def _gelu_layer_norm(rows: int, device: torch.device) -> Problem:
    return Problem(
        "gelu_layer_norm",
        f"{rows} H={HIDDEN}",
        device,
        {"x": (rows, HIDDEN), "bias": (HIDDEN,), "gamma": (HIDDEN,), "beta": (HIDDEN,)},
        lambda implementation, x, bias, gamma, beta: ops.gelu_layer_norm(
            x, bias, gamma, beta, EPS, implementation=implementation
        ),
    )


def _embed(shape: str, batch: Sequences, vocab_size: int) -> Problem:
    device = batch.position.device
    token_ids = _integers(device, vocab_size, len(batch.position))
    token_types, mask = token_ids % 2, _dropout(batch, "embeddings", None)
    tables = {"word": (vocab_size, HIDDEN), "position": (512, HIDDEN), "token_type": (2, HIDDEN)}
    return Problem(
        "embeddings",
        f"{shape} H={HIDDEN} V={vocab_size} dropout",
        device,
        tables | {"gamma": (HIDDEN,), "beta": (HIDDEN,)},
        lambda implementation, word, position, token_type, gamma, beta: ops.embeddings(
            token_ids,
            token_types,
            batch.position,
            word,
            position,
            token_type,
            gamma,
            beta,
            EPS,
            mask,
            padding_index=0,
            implementation=implementation,
        ),
    )


def _linear_cross_entropy(tokens: int, rows: int, vocab_size: int, device: torch.device) -> Problem:
    # Every row of `hidden` is selected at most once, in random order; every eighth label is ignored.
    selected = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))[:rows].to(device)
    labels = _integers(device, vocab_size, rows)
    labels[::8] = IGNORE_INDEX
    return Problem(
        "linear_cross_entropy",
        f"{rows} H={HIDDEN} V={vocab_size}",
        device,
        {"hidden": (tokens, HIDDEN), "weight": (vocab_size, HIDDEN), "bias": (vocab_size,)},
        lambda implementation, hidden, weight, bias: ops.linear_cross_entropy(
            hidden, selected, weight, bias, labels, implementation=implementation
        )[0],
    )
