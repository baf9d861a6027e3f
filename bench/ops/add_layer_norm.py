"""`add_layer_norm` vs PyTorch's composition, eager and compiled, and the composition with Liger's LayerNorm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import (
    BACKEND,
    EPS,
    Factory,
    Function,
    Output,
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
    """Rows of x and of the residual, which may be an fp32 stream as in autocast: the next GEMM then reads a copy."""

    fp32_stream: bool = False

    @property
    def size(self) -> str:
        return super().size + "-fp32-stream" * self.fp32_stream

    @property
    def predicted_case(self) -> str | None:
        name = super().predicted_case
        return name and name.replace(" columns", " columns, fp32 stream" if self.fp32_stream else " columns")

    @cached_property
    def drop(self) -> Dropout | None:
        """Dropout of x."""
        return dropout_over(packed(self.rows), self.dropout, "output")

    def inputs(self, generator: torch.Generator) -> list[Tensor]:
        x, residual = (self.normal(generator, self.rows, self.width) for _ in range(2))
        others = [residual, *(self.normal(generator, self.width) for _ in range(3))]
        return [x, *(other.float() if self.fp32_stream else other for other in others)]

    def definition(self, x: Tensor, residual: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor) -> Output:
        # The copy has the precision of x; the result in float64 is not rounded.
        copy_dtype = x.dtype if self.fp32_stream else None
        return reference.add_layer_norm(x, residual, bias, gamma, beta, EPS, self.drop, copy_dtype)

    def work(self, direction: str) -> Work:
        elements, item = self.rows * self.width, self.dtype.itemsize
        stream, copy = (4, item) if self.fp32_stream else (item, 0)
        if direction == "forward":  # reads x and the residual, writes the output and its copy
            return Work((item + 2 * stream + copy) * elements)
        # Reads both and the gradients of the outputs, writes those of x and of the residual, which are the same tensor
        # without dropout and in one precision.
        d_x = item if self.dropout or self.fp32_stream else 0
        return Work((item + 3 * stream + copy + d_x) * elements)


def fused(case: AddLayerNormCase, implementation: Backend | None = BACKEND) -> Function:
    copy_dtype = case.dtype if case.fp32_stream else None
    return lambda x, residual, bias, gamma, beta: ops.add_layer_norm(
        x, residual, bias, gamma, beta, EPS, case.drop, compute_dtype=copy_dtype, implementation=implementation
    )


def composition(case: AddLayerNormCase) -> Function:
    def function(x: Tensor, residual: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor) -> Output:
        y = F.layer_norm(residual + F.dropout(x + bias, case.dropout), gamma.shape, gamma, beta, EPS)
        return (y, y.to(x.dtype)) if case.fp32_stream else y

    return function


def with_liger(case: AddLayerNormCase) -> Function:
    if case.fp32_stream:
        pytest.skip("it is compared in one precision only")
    layer_norm = liger().liger_layer_norm

    def function(x: Tensor, residual: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        output: Tensor = layer_norm(residual + F.dropout(x + bias, case.dropout), gamma, beta, EPS)
        return output

    return function


CASES = {
    "small": [
        *in_both_precisions(*(AddLayerNormCase(rows=40, width=48, dropout=p) for p in (0.0, 0.1))),
        AddLayerNormCase(rows=40, width=48, dropout=0.1, fp32_stream=True),
    ],
    "cpu": in_both_precisions(*(AddLayerNormCase(rows=4096, dropout=p) for p in (0.0, 0.1))),
    "main": [AddLayerNormCase(dropout=0.1), AddLayerNormCase(width=1024, dropout=0.1)],
    "predicted": [AddLayerNormCase(), AddLayerNormCase(dropout=0.1, fp32_stream=True)],
    "rest": [AddLayerNormCase(width=1024), AddLayerNormCase(width=384, dropout=0.1)],
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
