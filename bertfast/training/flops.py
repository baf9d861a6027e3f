"""FLOPs of a pre-training step, and the measured GEMM throughput of the device to compare them with."""

from __future__ import annotations

import time

import torch
from transformers import BertConfig

from bertfast.data.batches import Batch
from bertfast.models.families import architecture_of, config_entry
from bertfast.ops.matmul import linear
from bertfast.runtime.precision import wait_for


def step_flops(config: BertConfig, batch: Batch) -> int:
    """Return the FLOPs of a batch, forward and backward, without padding.

    With hidden size H, L layers and vocabulary size V, these are 6 · encoder parameters · tokens + 12 · L · H · Σ s²
    over the sequence lengths s + 6 · (H · E + E · V) · masked tokens, where the embedding size E is H in most families.
    In a layer with a window of w positions on each side, s · (2 w + 1) replaces s² if that is less.
    """
    hidden, layers, architecture = config.hidden_size, config.num_hidden_layers, architecture_of(config)
    embedding: int = getattr(config, architecture.width)
    intermediate: int = config_entry(config, "intermediate_size")
    parameters = layers * hidden * (4 * hidden + (3 if architecture.gated else 2) * intermediate)
    parameters += embedding * hidden if embedding != hidden else 0  # their projection
    kinds: list[str] = getattr(config, "layer_types", None) or ["full_attention"] * layers
    widest = max(batch.sequences.lengths, default=0)
    spans = [
        widest if kind == "full_attention" else 2 * getattr(config, "sliding_window", widest) + 1 for kind in kinds
    ]
    pairs = sum(length * min(length, span) for span in spans for length in batch.sequences.lengths)
    head = embedding * (hidden + config.vocab_size)
    return 6 * parameters * batch.num_tokens + 12 * hidden * pairs + 6 * head * batch.masked


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
