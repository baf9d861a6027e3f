"""The lower bound of a workload: the seconds that every implementation needs at least on this machine.

It is the time of the model's FLOPs, without padding, at the measured GEMM throughput, or of reading the weights of the
GEMMs once per batch at the bandwidth of a copy, if that takes longer. In training the optimizer's traffic at that
bandwidth is added, because an update starts after the last gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from bench.ceilings import copy_bandwidth, gemm_throughput, inference_gemm_throughput, layer_gemms
from bench.harness import ON_GPU
from bertfast.training.flops import encoder_flops, encoder_parameters

if TYPE_CHECKING:
    from transformers import BertConfig

# Bytes per parameter that AdamW in fp32 moves: it reads weight, gradient, two moments, and writes all but the gradient.
ADAMW_BYTES = 28
COPIED = 2 << 30 if ON_GPU else 256 << 20  # bytes, more than the caches hold


@dataclass(frozen=True)
class Rates:
    """What bounds a workload on this machine.

    Attributes:
        flops: FLOP/s of the model's GEMMs in the precision of the workload.
        bytes: Bytes/s of a copy, reads and writes both counted.
    """

    flops: float
    bytes: float

    @classmethod
    def measured(cls, config: BertConfig, tokens: int, dtype: torch.dtype, *, training: bool = False) -> Rates:
        """Measure the GEMMs of a layer on `tokens` rows, in training with those of the backward pass, and a copy."""
        shapes = layer_gemms(config, tokens) * 2
        flops = gemm_throughput(with_backward(shapes), dtype) if training else inference_gemm_throughput(shapes, dtype)
        return cls(flops, copy_bandwidth(COPIED))

    def inference(self, config: BertConfig, batches: Sequence[Sequence[int]], weight_bytes: int = 4) -> float:
        """Return the seconds of an encoder's forward passes.

        Args:
            config: Sizes of the encoder.
            batches: Tokens of each sequence of each batch.
            weight_bytes: Bytes of a weight.
        """
        flops = encoder_flops(config, [length for lengths in batches for length in lengths])
        return max(flops / self.flops, self.reading(config, len(batches), weight_bytes))

    def reading(self, config: BertConfig, batches: int, weight_bytes: int = 4) -> float:
        """Return the seconds of reading the weights of an encoder's GEMMs once per batch."""
        return batches * encoder_parameters(config) * weight_bytes / self.bytes

    def training(self, config: BertConfig, lengths: Sequence[int], parameters: int = 0) -> float:
        """Return the seconds of forward and backward pass, whose FLOPs are three times those of the forward pass.

        Args:
            config: Sizes of the encoder; the work of a head is not counted.
            lengths: Tokens of each sequence.
            parameters: Number of parameters that AdamW updates; 0: no update.
        """
        return 3 * encoder_flops(config, lengths) / self.flops + self.update(parameters)

    def update(self, parameters: int) -> float:
        """Return the seconds of the traffic of an AdamW update."""
        return ADAMW_BYTES * parameters / self.bytes

    def entries(self) -> dict[str, float]:
        """Return the rates as result files contain them."""
        return {"gemm_gflops": self.flops / 1e9, "copy_gb_per_s": self.bytes / 1e9}


def with_backward(shapes: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Return (m, k, n) of forward GEMMs, each followed by those of the gradients of its input and of its weight."""
    return [shape for m, k, n in shapes for shape in ((m, k, n), (m, n, k), (n, m, k))]


def step_bound(result: dict[str, Any]) -> float:
    """Return the lower bound of a pre-training step from its result file: GEMMs, and the optimizer where measured.

    Where the update itself reached a higher bandwidth than the copy, its time is the bound.
    """
    update = min(result["optimizer_lower_bound_s"], result["optimizer_s"]) if "copy_gb_per_s" in result else 0.0
    return float(result["lower_bound_s"] + update)
