"""`gelu_layer_norm` vs PyTorch's composition, eager and compiled, and the composition with Liger's LayerNorm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import (
    BACKEND,
    EPS,
    Factory,
    Function,
    RowsCase,
    Work,
    compiled,
    definition,
    in_both_precisions,
    in_cuda,
    liger,
)
from bertfast import ops
from bertfast.ops import reference
from bertfast.ops.dispatch import Implementation as Backend


@dataclass(frozen=True, kw_only=True)
class GeluLayerNormCase(RowsCase):
    """Rows of masked tokens."""

    def inputs(self, generator: torch.Generator) -> list[Tensor]:
        return [self.normal(generator, self.rows, self.width), *(self.normal(generator, self.width) for _ in range(3))]

    def definition(self, x: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return reference.gelu_layer_norm(x, bias, gamma, beta, EPS)

    def work(self, direction: str) -> Work:
        activation = self.rows * self.width * self.dtype.itemsize
        return Work((2 if direction == "forward" else 3) * activation)  # backward reads x and d_y, writes d_x


def fused(case: GeluLayerNormCase, implementation: Backend | None = BACKEND) -> Function:
    return lambda x, bias, gamma, beta: ops.gelu_layer_norm(x, bias, gamma, beta, EPS, implementation=implementation)


def composition(case: GeluLayerNormCase) -> Function:
    return lambda x, bias, gamma, beta: F.layer_norm(F.gelu(x + bias), gamma.shape, gamma, beta, EPS)


def with_liger(case: GeluLayerNormCase) -> Function:
    layer_norm = liger().liger_layer_norm
    return lambda x, bias, gamma, beta: layer_norm(F.gelu(x + bias), gamma, beta, EPS)


CASES = {
    "small": in_both_precisions(GeluLayerNormCase(rows=40, width=48)),
    "cpu": in_both_precisions(GeluLayerNormCase(rows=4096)),
    "main": [GeluLayerNormCase()],
    "rest": [GeluLayerNormCase(width=1024), GeluLayerNormCase(rows=5000)],
}
IMPLEMENTATIONS: dict[str, Factory] = {
    "bertfast": fused,
    **in_cuda(fused),
    "definition": definition,
    "torch": composition,
    "torch.compile": compiled(composition),
    "liger": with_liger,
}


def test_gelu_layer_norm(measure: Callable[[], None]) -> None:
    measure()
