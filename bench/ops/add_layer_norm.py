"""`add_layer_norm` vs PyTorch's composition, eager and compiled, and the composition with Liger's LayerNorm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

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
    dropout_over,
    in_both_precisions,
    in_cuda,
    liger,
    packed,
)
from bertfast import ops
from bertfast.ops import reference
from bertfast.ops.dispatch import Implementation as Backend
from bertfast.ops.dropout import Dropout


@dataclass(frozen=True, kw_only=True)
class AddLayerNormCase(RowsCase):
    """Rows of x and of the residual."""

    @cached_property
    def drop(self) -> Dropout | None:
        """Dropout of x."""
        return dropout_over(packed(self.rows), self.dropout, "output")

    def inputs(self, generator: torch.Generator) -> list[Tensor]:
        rows = [self.normal(generator, self.rows, self.width) for _ in range(2)]
        return rows + [self.normal(generator, self.width) for _ in range(3)]

    def definition(self, x: Tensor, residual: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        output = reference.add_layer_norm(x, residual, bias, gamma, beta, EPS, self.drop)
        assert isinstance(output, Tensor), "there is a copy only with `compute_dtype`"
        return output

    def work(self, direction: str) -> Work:
        activation = self.rows * self.width * self.dtype.itemsize
        if direction == "forward":  # reads x and the residual, writes the output
            return Work(3 * activation)
        # Reads both and the gradient of the output, writes both gradients, which are the same tensor without dropout.
        return Work((5 if self.dropout else 4) * activation)


def fused(case: AddLayerNormCase, implementation: Backend | None = BACKEND) -> Function:
    return lambda x, residual, bias, gamma, beta: ops.add_layer_norm(
        x, residual, bias, gamma, beta, EPS, case.drop, implementation=implementation
    )


def composition(case: AddLayerNormCase) -> Function:
    def function(x: Tensor, residual: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return F.layer_norm(residual + F.dropout(x + bias, case.dropout), gamma.shape, gamma, beta, EPS)

    return function


def with_liger(case: AddLayerNormCase) -> Function:
    layer_norm = liger().liger_layer_norm

    def function(x: Tensor, residual: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        output: Tensor = layer_norm(residual + F.dropout(x + bias, case.dropout), gamma, beta, EPS)
        return output

    return function


CASES = {
    "small": in_both_precisions(*(AddLayerNormCase(rows=40, width=48, dropout=p) for p in (0.0, 0.1))),
    "cpu": in_both_precisions(*(AddLayerNormCase(rows=4096, dropout=p) for p in (0.0, 0.1))),
    "main": [AddLayerNormCase(dropout=0.1), AddLayerNormCase(width=1024, dropout=0.1)],
    "rest": [AddLayerNormCase(), AddLayerNormCase(width=1024), AddLayerNormCase(width=384, dropout=0.1)],
}
IMPLEMENTATIONS: dict[str, Factory] = {
    "bertfast": fused,
    **in_cuda(fused),
    "definition": definition,
    "torch": composition,
    "torch.compile": compiled(composition),
    "liger": with_liger,
}


def test_add_layer_norm(measure: Callable[[], None]) -> None:
    measure()
