"""`linear_gelu` vs a library GEMM followed by `bias_gelu`, and vs PyTorch's composition."""

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
    RowsCase,
    Work,
    compiled,
    definition,
    in_both_precisions,
)
from bench.harness import ON_GPU
from bertfast import ops
from bertfast.ops import reference
from bertfast.ops.bias_gelu import LinearGelu
from bertfast.ops.dispatch import run


@dataclass(frozen=True, kw_only=True)
class LinearGeluCase(RowsCase):
    """`rows` tokens; the weight maps `width` columns to four times as many."""

    @property
    def size(self) -> str:
        return f"{self.rows}x{self.width}x{4 * self.width}"

    @property
    def predicted_case(self) -> str | None:
        return None if super().predicted_case is None else f"{self.width} x {4 * self.width:,}"

    def inputs(self, generator: torch.Generator) -> list[Tensor]:
        columns = 4 * self.width
        weight = self.normal(generator, columns, self.width, scale=self.width**-0.5)
        return [self.normal(generator, self.rows, self.width), weight, self.normal(generator, columns)]

    def definition(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.linear_gelu(x, weight, bias, "none")

    def work(self, direction: str) -> Work:
        narrow, wide, weight = self.rows * self.width, 4 * self.rows * self.width, 4 * self.width**2
        flops = 2 * self.rows * weight
        if direction == "forward":  # reads x and the weight, writes the GEMM output, which backward needs, and its GELU
            return Work((narrow + weight + 2 * wide) * self.dtype.itemsize, flops)
        # Reads x, the weight, the GEMM output and d_y, writes d_x and d_weight.
        return Work(2 * (narrow + weight + wide) * self.dtype.itemsize, 2 * flops)


def fused(case: LinearGeluCase) -> Function:
    return lambda x, weight, bias: ops.linear_gelu(x, weight, bias, implementation=BACKEND)


def in_one_kernel(case: LinearGeluCase) -> Function:
    """Make the kernel with GELU as the epilogue, which no shape uses until it is measured to be faster."""
    return lambda x, weight, bias: run(LinearGelu, x, weight, bias, "none")


def linear_and_bias_gelu(case: LinearGeluCase) -> Function:
    return lambda x, weight, bias: ops.bias_gelu(F.linear(x, weight), bias, implementation=BACKEND)


CASES = {
    "small": in_both_precisions(LinearGeluCase(rows=40, width=48)),
    "cpu": in_both_precisions(LinearGeluCase(rows=2048, width=768)),
    "main": [LinearGeluCase(width=768)],
    "rest": [LinearGeluCase(width=1024)],
}
IMPLEMENTATIONS: dict[str, Factory] = {
    "bertfast": fused,
    **({"bertfast-fused": in_one_kernel} if ON_GPU else {}),
    "linear+bias_gelu": linear_and_bias_gelu,
    "definition": definition,
    "torch.compile": compiled(definition),
}


def test_linear_gelu(measure: Callable[[], None]) -> None:
    measure()
