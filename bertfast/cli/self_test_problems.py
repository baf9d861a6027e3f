"""The inputs of `bertfast doctor --check`: each operator at BERT's shapes and at others, on random values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bertfast import ops
from bertfast.ops.attention import HEAD_DIMENSIONS
from bertfast.ops.bias_gelu import Approximate
from bertfast.ops.dispatch import Implementation
from bertfast.ops.dropout import Dropout, RngCoordinates
from bertfast.ops.gated_activation import Activation
from bertfast.ops.reference import IGNORE_INDEX
from bertfast.ops.sequences import Sequences

EPS = 1e-12  # of LayerNorm
DROPOUT = 0.1
MASKED = 0.15  # share of the tokens that have a label
HIDDEN = 768
# Lengths with partial blocks of every attention kernel; those above 128 have backward kernels of their own.
MIXED = (130, 1, 0, 64, 330, 33)
PADDING_SLOTS = 3
MASK_ID, PADDING_ID = 103, 0  # token ids of [MASK] and [PAD] in BERT's vocabulary


@dataclass(frozen=True, eq=False)
class Problem:
    """An operator on inputs of one shape.

    Attributes:
        operator: Name in `bertfast.ops`.
        shape: Shape and options, such as "4x512 D=64 dropout": 4 sequences of 512 tokens, head dimension 64. "mixed"
            has sequences of 0 to 330 tokens, "at-most-32" of 0 to 32, both with padding slots; half of "frequent" token
            ids are equal or padding.
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
    """Return every operator, the most informative problems first.

    GPUs get 2,048 tokens of 768 columns and BERT's vocabulary. CPUs get less, so that all checks take less than a
    minute on two cores; their vocabulary leaves the same remainder for every vector width as BERT's. The shapes after
    those of BERT are for branches that these do not reach, with options that few more kernels have to be compiled for.
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
        result += _irregular_attention(dimension, device)
        if dimension == 64:
            result += _irregular_row_problems(shapes[-1], batches[-1])
    return result


def _irregular_attention(dimension: int, device: torch.device) -> list[Problem]:
    """Return attention on sequences of different lengths, on short and on long ones, and with its options."""
    on_gpu = device.type == "cuda"
    heads = HIDDEN // dimension if on_gpu else 2
    mixed = _padded_batch(MIXED * (3 if on_gpu else 1), device)  # on a GPU more work tiles than SMs
    bound = 32 if dimension == 64 else 64  # kernels have block shapes of their own for either
    short = _padded_batch((bound, 1, 0, 17), device)
    length = 1100 if on_gpu else 600
    long = Sequences.from_lengths([length], device=device)
    options: dict[int, dict[str, Any]] = {64: {"window": 20, "scale": 0.2}, 32: {"causal": True}, 128: {"window": 20}}
    return [
        _attention("mixed", mixed, heads, dimension, dropout=True),
        _attention("mixed", mixed, heads, dimension, dropout=False),
        _attention(f"1x{length}", long, heads, dimension, dropout=True),
        _attention(f"at-most-{bound}", short, heads, dimension, dropout=True),
        _attention("mixed", mixed, heads, dimension, dropout=False, **options[dimension]),
    ]


def _padded_batch(lengths: tuple[int, ...], device: torch.device) -> Sequences:
    return Sequences.from_lengths(lengths, capacity=sum(lengths) + PADDING_SLOTS, device=device)


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


def _irregular_row_problems(shape: str, batch: Sequences) -> list[Problem]:
    """Return the other operators at widths that have configurations of their own, and with frequent indices."""
    device = batch.position.device
    on_gpu = device.type == "cuda"
    many = Sequences.from_lengths([128] * (64 if on_gpu else 4), device=device)
    return [
        _embed(f"{len(many)}x128", many, 4090, width=384, types=3, frequent=True),
        # On a GPU more rows than a chunk of logits has at any vocabulary size.
        _linear_cross_entropy(4200 if on_gpu else 300, None, 4090, device, width=128),
        _add_layer_norm(shape, batch, dropout=True, width=1024),
        _pre_norm(shape, batch, rms=True, width=2304),
        _bias_gelu(shape, len(batch.position), device, "tanh"),
        _rotary(shape, batch, dimension=96),
    ]


def _integers(device: torch.device, bound: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(bound)
    return torch.randint(bound, (size,), generator=generator).to(device)


def _dropout(batch: Sequences, site: str, layer: int | None) -> Dropout | None:
    seed = torch.tensor(0x0123_4567_89AB_CDEF, device=batch.position.device)
    return RngCoordinates(seed, batch.token_sequence_ids, batch.position).dropout(DROPOUT, site, layer)


def _attention(shape: str, batch: Sequences, heads: int, dimension: int, dropout: bool, **options: Any) -> Problem:
    """Call it with these `options` of the operator, which the shape names too."""
    mask = _dropout(batch, "attention", 0) if dropout else None
    words = [shape, f"D={dimension}", *["dropout"] * dropout, *(f"{name}={value}" for name, value in options.items())]
    return Problem(
        "attention",
        " ".join(words),
        batch.position.device,
        {"qkv": (len(batch.position), 3, heads, dimension)},
        lambda implementation, qkv: ops.attention(qkv, batch, dropout=mask, implementation=implementation, **options),
    )


def _add_layer_norm(shape: str, batch: Sequences, dropout: bool, width: int = HIDDEN) -> Problem:
    mask = _dropout(batch, "output", 0) if dropout else None
    rows, vector = (len(batch.position), width), (width,)
    return Problem(
        "add_layer_norm",
        f"{shape} H={width}" + " dropout" * dropout,
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


def _pre_norm(shape: str, batch: Sequences, rms: bool, width: int = HIDDEN) -> Problem:
    """Call it as an RMSNorm without dropout and biases, as EuroBERT does, or as a LayerNorm with all of them."""
    mask = None if rms else _dropout(batch, "output", 0)
    rows, vector = (len(batch.position), width), (width,)

    def call(
        implementation: Implementation, x: Tensor, residual: Tensor, gamma: Tensor, *biases: Tensor
    ) -> tuple[Tensor, Tensor]:
        bias, beta = biases if biases else (None, None)
        return ops.pre_norm(x, residual, bias, gamma, beta, EPS, mask, rms=rms, implementation=implementation)

    return Problem(
        "pre_norm",
        f"{shape} H={width} {'rms' if rms else 'dropout'}",
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


def _rotary(shape: str, batch: Sequences, dimension: int = 64) -> Problem:
    heads, device = HIDDEN // dimension, batch.position.device
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


def _bias_gelu(shape: str, tokens: int, device: torch.device, approximate: Approximate = "none") -> Problem:
    return Problem(
        "bias_gelu",
        f"{shape} H={4 * HIDDEN}" + " tanh" * (approximate == "tanh"),
        device,
        {"x": (tokens, 4 * HIDDEN), "bias": (4 * HIDDEN,)},
        lambda implementation, x, bias: ops.bias_gelu(x, bias, approximate, implementation=implementation),
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


def _embed(
    shape: str, batch: Sequences, vocab_size: int, width: int = HIDDEN, types: int = 2, frequent: bool = False
) -> Problem:
    """Call it with token ids that are equally frequent, or every second of which is that of [MASK] or of padding."""
    device, tokens = batch.position.device, len(batch.position)
    token_ids, token_types = _integers(device, vocab_size, tokens), _integers(device, types, tokens)
    if frequent:
        token_ids[::2], token_ids[::8] = MASK_ID, PADDING_ID
    mask = _dropout(batch, "embeddings", None)
    tables = {"word": (vocab_size, width), "position": (512, width), "token_type": (types, width)}
    return Problem(
        "embeddings",
        f"{shape} H={width} dropout frequent" if frequent else f"{shape} H={width} V={vocab_size} dropout",
        device,
        tables | {"gamma": (width,), "beta": (width,)},
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
            padding_index=PADDING_ID,
            implementation=implementation,
        ),
    )


def _linear_cross_entropy(
    tokens: int, rows: int | None, vocab_size: int, device: torch.device, width: int = HIDDEN
) -> Problem:
    """Call it for `rows` of the tokens in random order, or for all of them (None); every eighth label is ignored."""
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(0)).to(device)
    selected = None if rows is None else order[:rows]
    labels = _integers(device, vocab_size, tokens if rows is None else rows)
    labels[::8] = IGNORE_INDEX
    return Problem(
        "linear_cross_entropy",
        f"{len(labels)} H={width} V={vocab_size}" + " rows=None" * (rows is None),
        device,
        {"hidden": (tokens, width), "weight": (vocab_size, width), "bias": (vocab_size,)},
        lambda implementation, hidden, weight, bias: ops.linear_cross_entropy(
            hidden, selected, weight, bias, labels, implementation=implementation
        )[0],
    )
