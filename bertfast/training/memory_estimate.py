"""How much memory a run will take, before its first step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import BertConfig

_STATES = {"adamw": 2, "lamb": 2, "muon": 1}  # tensors that an optimizer keeps of a parameter


@dataclass(frozen=True)
class Footprint:
    """Bytes of a rank: of parameters, their gradients and the optimizer's states, and of activations for each token."""

    parameters: int
    gradients: int
    optimizer: int
    per_token: int
    tokens: int

    @property
    def total(self) -> int:
        """All of them for a batch of `tokens`."""
        return self.fixed + self.per_token * self.tokens

    @property
    def fixed(self) -> int:
        """What does not depend on the batch."""
        return self.parameters + self.gradients + self.optimizer

    def __str__(self) -> str:
        return (
            f"memory: {_gib(self.parameters)} of parameters, {_gib(self.gradients)} of gradients, "
            f"{_gib(self.optimizer)} of the optimizer, {self.per_token / 1024:.0f} KiB of activations a token, "
            f"{_gib(self.total)} in all"
        )

    def check(self, available: int | None) -> None:
        """Raise ValueError, with the largest batch that fits, where `available` bytes are too few for this one."""
        if available is None or self.total <= available:
            return
        most = max(available - self.fixed, 0) // self.per_token // 64 * 64
        remedy = f"tokens_per_batch of at most {most} fits" if most else "no batch fits: take a smaller model, or shard"
        raise ValueError(
            f"a batch of {self.tokens} tokens will not fit: it takes {_gib(self.total)} and there are "
            f"{_gib(available)}; {remedy}, and checkpoint_layers saves activations"
        )


def footprint(
    model: nn.Module,
    config: BertConfig,
    *,
    optimizer: str,
    precision: str,
    tokens: int,
    checkpointed: int,
    ranks: int,
    residual_precision: str = "fp32",
) -> Footprint:
    """The memory of a run; `ranks` is how many share each parameter (1: none do)."""
    size = sum(p.numel() * p.element_size() for p in model.parameters()) // ranks
    states = _STATES[optimizer] * size
    of_layer = activations(config, precision, residual_precision)
    layer_input = config.hidden_size * (2 if residual_precision == "bf16" else 4)
    spared = min(checkpointed, config.num_hidden_layers)
    per_token = (config.num_hidden_layers - spared) * of_layer + spared * layer_input
    per_token += of_layer if spared else 0  # one layer at a time is recomputed
    return Footprint(size, size, states, per_token, tokens)


def activations(config: BertConfig, precision: str, residual_precision: str = "fp32") -> int:
    """Return the bytes that a layer keeps of a token for its backward pass.

    Under autocast what enters a GEMM is kept in 16 bits, and besides it the residual stream if that is fp32.
    """
    hidden, wide, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    lse, statistics = 4 * heads, 4 * 4
    if precision == "fp32":
        # Its input, qkv, the context, both products that LayerNorm reads, what lies between, the wide product and GELU.
        return 4 * (hidden + 3 * hidden + hidden + 2 * hidden + hidden + 2 * wide) + lse + statistics
    stream = 4 * 2 * hidden if residual_precision == "fp32" else 0  # in bf16 it is what enters the GEMMs
    return 2 * (2 * hidden + 3 * hidden + hidden + 2 * hidden + 2 * wide) + stream + lse + statistics


def available_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device; None if it does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    facts = Path("/proc/meminfo")
    if not facts.is_file():
        return None
    lines = dict(line.split(":", 1) for line in facts.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
