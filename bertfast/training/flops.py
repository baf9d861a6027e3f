"""What a pre-training step must compute, and how fast products are here: the one as a share of the other."""

from __future__ import annotations

import time

import torch
from transformers import BertConfig

from bertfast.data.batches import Batch
from bertfast.ops.matmul import linear
from bertfast.runtime.precision import wait_for


def step_flops(config: BertConfig, batch: Batch) -> int:
    """6 · encoder parameters · tokens + 12 · layers · H · Σ s² + 6 · (H² + H V) · masked tokens; padding is no work."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    parameters = layers * hidden * (4 * hidden + 2 * config.intermediate_size)
    squares = sum(length**2 for length in batch.sequences.lengths)
    head = hidden * (hidden + config.vocab_size)
    return 6 * parameters * batch.num_tokens + 12 * layers * hidden * squares + 6 * head * batch.masked


def gemm_throughput(
    config: BertConfig, tokens: int, dtype: torch.dtype, device: torch.device, budget: float = 0.3
) -> float:
    """FLOP/s of a layer's wide product on `tokens`, the best within `budget` seconds."""
    hidden, wide = config.hidden_size, config.intermediate_size
    x, weight = (
        torch.randn(tokens, hidden, dtype=dtype, device=device),
        torch.randn(wide, hidden, dtype=dtype, device=device),
    )
    best, end = float("inf"), time.perf_counter() + budget
    while best == float("inf") or time.perf_counter() < end:
        wait_for(device)
        started = time.perf_counter()
        linear(x, weight)
        wait_for(device)
        best = min(best, time.perf_counter() - started)
    return 2 * tokens * hidden * wide / best
