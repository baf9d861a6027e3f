"""FLOPs of a pre-training step, and the measured GEMM throughput of the device to compare them with."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from transformers import BertConfig

from bertfast.data.batches import Batch
from bertfast.models.families import architecture_of, config_entry
from bertfast.ops.matmul import linear
from bertfast.runtime.precision import wait_for


def step_flops(config: BertConfig, batch: Batch) -> int:
    """Return the FLOPs of a batch, forward and backward, without padding; see `training_flops`."""
    return training_flops(config, batch.sequences.lengths, batch.masked)


def training_flops(config: BertConfig, lengths: Sequence[int], masked: int) -> int:
    """Return the FLOPs of sequences in pre-training, forward and backward.

    The backward pass takes twice those of the forward pass: 3 · `encoder_flops` + 6 · (H · E + E · V) · masked tokens,
    with hidden size H, vocabulary size V and embedding size E, which is H in most families.
    """
    return 3 * (encoder_flops(config, lengths) + head_flops(config, masked))


def head_flops(config: BertConfig, masked: int) -> int:
    """Return the FLOPs of the masked-LM head's forward pass: 2 · (H · E + E · V) · masked tokens."""
    embedding: int = getattr(config, architecture_of(config).width)
    return 2 * embedding * (config.hidden_size + config.vocab_size) * masked


def encoder_flops(config: BertConfig, lengths: Sequence[int]) -> int:
    """Return the FLOPs of an encoder's forward pass on sequences: 2 · parameters · tokens + 4 · H · attended pairs."""
    hidden: int = config.hidden_size
    kinds: list[str] = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    pairs = 0
    for kind in kinds:
        window = None if kind == "full_attention" else config.sliding_window
        pairs += sum(_pairs(length, window) for length in lengths)
    return 2 * encoder_parameters(config) * sum(lengths) + 4 * hidden * pairs


def encoder_parameters(config: BertConfig) -> int:
    """Return the number of weights in the GEMMs of all layers, and of one between embeddings and layers if there is."""
    hidden, layers, architecture = config.hidden_size, config.num_hidden_layers, architecture_of(config)
    embedding: int = getattr(config, architecture.width)
    intermediate: int = config_entry(config, "intermediate_size")
    parameters: int = layers * hidden * (4 * hidden + (3 if architecture.gated else 2) * intermediate)
    return parameters + (embedding * hidden if embedding != hidden else 0)


def _pairs(length: int, window: int | None) -> int:
    """Return the number of pairs of positions in a sequence that are at most `window` apart; None: all pairs."""
    if window is None or length <= window:
        return length**2
    return length * (2 * window + 1) - window * (window + 1)  # the window is cut off at both ends


def gemm_throughput(
    config: BertConfig, tokens: int, dtype: torch.dtype, device: torch.device, budget: float = 0.3
) -> float:
    """Measure the GEMM throughput of the device in FLOP/s.

    Args:
        config: Sizes of the GEMM, which is the first of a feed-forward layer.
        tokens: Its number of rows.
        dtype: dtype of the operands.
        device: Device to measure.
        budget: Seconds in which the GEMM is repeated; the fastest counts.
    """
    hidden: int = config.hidden_size
    intermediate: int = config_entry(config, "intermediate_size")
    x = torch.randn(tokens, hidden, dtype=dtype, device=device)
    weight = torch.randn(intermediate, hidden, dtype=dtype, device=device)
    best, end = float("inf"), time.perf_counter() + budget
    while best == float("inf") or time.perf_counter() < end:
        wait_for(device)
        started = time.perf_counter()
        linear(x, weight)
        wait_for(device)
        best = min(best, time.perf_counter() - started)
    return 2 * tokens * hidden * intermediate / best
