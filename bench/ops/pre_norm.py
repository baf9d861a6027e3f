"""`pre_norm` vs PyTorch's composition, eager and compiled, and the composition with Liger's norms."""

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
    Output,
    RowsCase,
    Work,
    compiled,
    definition,
    dropout_over,
    in_both_precisions,
    liger,
    packed,
)
from bertfast import ops
from bertfast.ops import reference
from bertfast.ops.dispatch import Implementation as Backend
from bertfast.ops.dropout import Dropout


@dataclass(frozen=True, kw_only=True)
class PreNormCase(RowsCase):
    """Rows of x and of the residual stream; without biases, as in ModernBERT (LayerNorm) and EuroBERT (RMSNorm)."""

    rms: bool = False

    @property
    def size(self) -> str:
        return super().size + ("-rms" if self.rms else "")

    @property
    def predicted_case(self) -> str | None:
        return None if self.rms else super().predicted_case

    @cached_property
    def drop(self) -> Dropout | None:
        """Dropout of x."""
        return dropout_over(packed(self.rows), self.dropout, "output")

    def inputs(self, generator: torch.Generator) -> list[Tensor]:
        rows = [self.normal(generator, self.rows, self.width) for _ in range(2)]
        return [*rows, self.normal(generator, self.width)]

    def definition(self, x: Tensor, residual: Tensor, gamma: Tensor) -> Output:
        return reference.pre_norm(x, residual, None, gamma, None, EPS, self.drop, self.rms, residual.dtype)

    def work(self, direction: str) -> Work:
        activation = self.rows * self.width * self.dtype.itemsize
        if direction == "forward":  # reads x and the residual, writes stream and norm
            return Work(4 * activation)
        # Reads the stream and both gradients, writes d_residual, which is also d_x without dropout.
        return Work((5 if self.dropout else 4) * activation)


def fused(case: PreNormCase, implementation: Backend | None = BACKEND) -> Function:
    return lambda x, residual, gamma: ops.pre_norm(
        x, residual, None, gamma, None, EPS, case.drop, rms=case.rms, implementation=implementation
    )


def composition(case: PreNormCase) -> Function:
    def function(x: Tensor, residual: Tensor, gamma: Tensor) -> Output:
        stream = residual + F.dropout(x, case.dropout)
        if case.rms:
            return stream, F.rms_norm(stream, gamma.shape, gamma, EPS)
        return stream, F.layer_norm(stream, gamma.shape, gamma, None, EPS)

    return function


def with_liger(case: PreNormCase) -> Function:
    functional = liger()

    def function(x: Tensor, residual: Tensor, gamma: Tensor) -> Output:
        stream = residual + F.dropout(x, case.dropout)
        if case.rms:
            return stream, functional.liger_rms_norm(stream, gamma, EPS)
        return stream, functional.liger_layer_norm(stream, gamma, torch.zeros_like(gamma), EPS)

    return function


CASES = {
    "small": in_both_precisions(*(PreNormCase(rows=40, width=48, rms=rms) for rms in (False, True))),
    "cpu": in_both_precisions(
        PreNormCase(rows=4096), PreNormCase(rows=4096, dropout=0.1), PreNormCase(rows=4096, rms=True)
    ),
    "main": [PreNormCase(), PreNormCase(rms=True)],
    "rest": [PreNormCase(dropout=0.1), PreNormCase(width=1024)],
}
IMPLEMENTATIONS: dict[str, Factory] = {
    "bertfast": fused,
    "definition": definition,
    "torch": composition,
    "torch.compile": compiled(composition),
    "liger": with_liger,
}


def test_pre_norm(measure: Callable[[], None]) -> None:
    measure()
