"""Estimate of the memory of a pre-training run, checked before its first step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import BertConfig

from bertfast.models.families import architecture_of, config_entry

_STATES = {"adamw": 2, "lamb": 2, "muon": 1}  # optimizer state tensors per parameter


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of one rank.

    Attributes:
        parameters: Bytes of the parameters.
        gradients: Bytes of their gradients.
        optimizer: Bytes of the optimizer state.
        per_token: Bytes of activations per token.
        tokens: Tokens per batch.
    """

    parameters: int
    gradients: int
    optimizer: int
    per_token: int
    tokens: int

    @property
    def total(self) -> int:
        """Bytes in total, for a batch of `tokens`."""
        return self.fixed + self.per_token * self.tokens

    @property
    def fixed(self) -> int:
        """Bytes that do not depend on the batch size."""
        return self.parameters + self.gradients + self.optimizer

    def __str__(self) -> str:
        return (
            f"estimated memory: parameters {_size(self.parameters)}, gradients {_size(self.gradients)}, "
            f"optimizer state {_size(self.optimizer)}, activations {self.per_token / 1024:.0f} KiB per token, "
            f"total {_size(self.total)}"
        )

    def check(self, available: int | None) -> None:
        """Raise ValueError, naming the largest batch that fits, if a batch needs more than `available` bytes.

        Args:
            available: Free memory in bytes; None: unknown, and nothing is checked.
        """
        if available is None or self.total <= available:
            return
        largest = max(available - self.fixed, 0) // self.per_token // 64 * 64
        remedy = (
            f"--tokens-per-batch {largest} is the largest that fits"
            if largest
            else "no batch fits: use a smaller model, or --shard on several GPUs"
        )
        raise ValueError(
            f"a batch of {self.tokens} tokens does not fit into memory: it needs {_size(self.total)} and "
            f"{_size(available)} are free; {remedy}; --checkpoint-layers reduces the memory of activations"
        )


def estimate_memory(
    model: nn.Module,
    config: BertConfig,
    *,
    optimizer: str,
    precision: str,
    tokens: int,
    checkpointed: int,
    ranks: int,
    residual_precision: str = "fp32",
) -> MemoryEstimate:
    """Estimate the memory of a run.

    Args:
        model: The model before it is wrapped for distributed training.
        config: Its configuration.
        optimizer: adamw, lamb or muon.
        precision: fp32, bf16 or fp16.
        tokens: Tokens per batch.
        checkpointed: Layers whose activations are recomputed in the backward pass.
        ranks: Number of processes over which every parameter is sharded; 1: not sharded.
        residual_precision: fp32 or bf16.
    """
    size = sum(p.numel() * p.element_size() for p in model.parameters()) // ranks
    states = _STATES[optimizer] * size
    layer_bytes = activations(config, precision, residual_precision)
    layer_input = config.hidden_size * (2 if residual_precision == "bf16" else 4)
    recomputed = min(checkpointed, config.num_hidden_layers)
    per_token = (config.num_hidden_layers - recomputed) * layer_bytes + recomputed * layer_input
    per_token += layer_bytes if recomputed else 0  # one layer at a time is recomputed
    return MemoryEstimate(size, size, states, per_token, tokens)


def activations(config: BertConfig, precision: str, residual_precision: str = "fp32") -> int:
    """Return the bytes per token that a layer saves for its backward pass.

    Under autocast the inputs of GEMMs are saved in 16 bits, and in addition the residual stream if that is fp32.
    """
    hidden: int = config.hidden_size
    heads: int = config.num_attention_heads
    # The MLP's first GEMM and its activation; a gated one has two columns for each that is activated.
    mlp: int = (3 if architecture_of(config).gated else 2) * config_entry(config, "intermediate_size")
    lse, statistics = 4 * heads, 4 * 4
    if precision == "fp32":
        # Layer input (hidden), qkv (3 hidden), context (hidden), the two GEMM outputs that add_layer_norm reads
        # (2 hidden), the first LayerNorm's output (hidden). A pre-norm layer saves as much: two streams, two norms.
        return 4 * (hidden + 3 * hidden + hidden + 2 * hidden + hidden + mlp) + lse + statistics
    stream = 4 * 2 * hidden if residual_precision == "fp32" else 0  # in bf16 it is itself the input of the GEMMs
    return 2 * (2 * hidden + 3 * hidden + hidden + 2 * hidden + mlp) + stream + lse + statistics


def available_memory(device: torch.device) -> int | None:
    """Return the free memory of a device in bytes, or None if it is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
