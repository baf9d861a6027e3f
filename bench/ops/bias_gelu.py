"""`bias_gelu` vs PyTorch's composition, eager and compiled, and vs its GELU alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import (
    BACKEND,
    Factory,
    Function,
    Implementation,
    RowsCase,
    Work,
    compiled,
    definition,
    in_both_precisions,
    in_cuda,
)
from bertfast import ops
from bertfast.ops import reference
from bertfast.ops.dispatch import Implementation as Backend


@dataclass(frozen=True, kw_only=True)
class BiasGeluCase(RowsCase):
    """Rows of the intermediate layer."""

    def inputs(self, generator: torch.Generator) -> list[Tensor]:
        return [self.normal(generator, self.rows, self.width), self.normal(generator, self.width)]

    def definition(self, x: Tensor, bias: Tensor) -> Tensor:
        return reference.bias_gelu(x, bias, "none")

    def work(self, direction: str) -> Work:
        activation = self.rows * self.width * self.dtype.itemsize
        return Work((2 if direction == "forward" else 3) * activation)  # backward reads x and d_y, writes d_x


def fused(case: BiasGeluCase, implementation: Backend | None = BACKEND) -> Function:
    return lambda x, bias: ops.bias_gelu(x, bias, implementation=implementation)


def gelu_out(case: BiasGeluCase) -> Implementation:
    """Make the activation alone, which writes to allocated memory: less work than the operation."""

    def function(x: Tensor, y: Tensor) -> Tensor:
        output: Tensor = torch.ops.aten.gelu.out(x.detach(), out=y.detach())
        return output

    return Implementation(function, lambda x, bias: (x, torch.empty_like(x)), checked=False)


def composition(case: BiasGeluCase) -> Function:
    return lambda x, bias: F.gelu(x + bias)


CASES = {
    "small": in_both_precisions(BiasGeluCase(rows=40, width=96)),
    "cpu": in_both_precisions(*(BiasGeluCase(rows=4096, width=width) for width in (768, 3072))),
    "main": [BiasGeluCase(width=3072)],
    "rest": [BiasGeluCase(width=4096)],
}
IMPLEMENTATIONS: dict[str, Factory] = {
    "bertfast": fused,
    **in_cuda(fused),
    "definition": definition,
    "torch": composition,
    "gelu.out": gelu_out,
    "torch.compile": compiled(composition),
}


def test_bias_gelu(measure: Callable[[], None]) -> None:
    measure()
